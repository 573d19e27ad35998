# pyproject.toml is the one place that states the version of this package and of the MLX it is built for.
set(pyproject "${CMAKE_CURRENT_LIST_DIR}/../pyproject.toml")

file(STRINGS "${pyproject}" version_line REGEX "^version = " LIMIT_COUNT 1)
string(REGEX REPLACE ".*\"(.*)\".*" "\\1" FLASH_ATTN_VERSION "${version_line}")

file(STRINGS "${pyproject}" mlx_line REGEX "\"mlx==" LIMIT_COUNT 1)
string(REGEX REPLACE ".*mlx==([0-9.]+).*" "\\1" FLASH_ATTN_MLX_PIN "${mlx_line}")

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${pyproject}")
