# find_package(FlashAttnMLX) for C++ users: target flash_attn_mlx::flash_attn and the public headers.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/FlashAttnMLX")
install(TARGETS flash_attn flash_attn_cpu flash_attn_metal EXPORT FlashAttnMLXTargets COMPONENT cpp)
install(DIRECTORY include/flash_attn TYPE INCLUDE COMPONENT cpp)
install(
  EXPORT FlashAttnMLXTargets
  NAMESPACE flash_attn_mlx::
  DESTINATION "${package_dir}"
  COMPONENT cpp)

configure_package_config_file(cmake/FlashAttnMLXConfig.cmake.in FlashAttnMLXConfig.cmake INSTALL_DESTINATION
                              "${package_dir}")
write_basic_package_version_file(FlashAttnMLXConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(
  FILES "${CMAKE_CURRENT_BINARY_DIR}/FlashAttnMLXConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/FlashAttnMLXConfigVersion.cmake"
  DESTINATION "${package_dir}"
  COMPONENT cpp)
