# flash_attn.flash_attn_mlx._core, its type stub, and the record of what it was built with.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
unset(nanobind_DIR CACHE)
find_package(nanobind CONFIG REQUIRED)

file(GLOB python_sources CONFIGURE_DEPENDS python/*.cpp)
# NB_DOMAIN mlx: types are shared with mlx.core, so that mx.array converts.
nanobind_add_module(_core NB_STATIC NB_DOMAIN mlx ${python_sources})
target_link_libraries(_core PRIVATE flash_attn flash_attn_options)
target_include_directories(_core PRIVATE src) # of _set_metal_launcher

# In site-packages libmlx lies two folders up, in mlx/lib.
if(APPLE)
  set(origin "@loader_path")
else()
  set(origin "$ORIGIN")
endif()
set_target_properties(_core PROPERTIES INSTALL_RPATH "${origin}/../../mlx/lib")

configure_file(cmake/BuildInfo.py.in _build_info.py @ONLY)
install(TARGETS _core DESTINATION flash_attn/flash_attn_mlx COMPONENT python)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_build_info.py" DESTINATION flash_attn/flash_attn_mlx COMPONENT python)
