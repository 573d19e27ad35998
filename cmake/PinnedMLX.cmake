# Finds the MLX of the Python that runs the build. -DMLX_ROOT= overrides.
#
# Nothing is cached: pip's isolated builds see MLX in a new temporary folder every time.
if(NOT MLX_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m mlx --cmake-dir
    OUTPUT_VARIABLE mlx_prefix
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE mlx_status
    ERROR_QUIET)
  if(NOT mlx_status EQUAL 0)
    message(FATAL_ERROR "${Python_EXECUTABLE} has no MLX. Install it: pip install 'mlx[cpu]==${FLASH_ATTN_MLX_PIN}'")
  endif()
  set(MLX_ROOT "${mlx_prefix}")
endif()
unset(MLX_DIR CACHE)
unset(MLX_LIBRARY CACHE)
find_package(MLX CONFIG REQUIRED)
if(NOT MLX_VERSION VERSION_EQUAL FLASH_ATTN_MLX_PIN)
  message(FATAL_ERROR "MLX ${MLX_VERSION} found in ${MLX_ROOT}; this version of flash-attn-mlx builds against "
                      "${FLASH_ATTN_MLX_PIN} only, because MLX's C++ ABI changes in patch releases.")
endif()
