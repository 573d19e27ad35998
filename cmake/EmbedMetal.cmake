# The sources of the Metal kernels as C++: embed_metal(target folder) adds a file that defines source_file() of src/metal/texts.h.

if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(EMBED_METAL_SCRIPT "${CMAKE_CURRENT_LIST_FILE}")

  function(embed_metal target folder)
    cmake_path(GET folder PARENT_PATH root)
    file(GLOB texts CONFIGURE_DEPENDS "${folder}/*.metal" "${folder}/params.h" "${root}/semantics/*.h")
    set(output "${CMAKE_CURRENT_BINARY_DIR}/metal_texts.cpp")
    add_custom_command(
      OUTPUT "${output}"
      COMMAND "${CMAKE_COMMAND}" -D "ROOT=${root}" -D "OUTPUT=${output}" -P "${EMBED_METAL_SCRIPT}" -- ${texts}
      DEPENDS ${texts} "${EMBED_METAL_SCRIPT}"
      COMMENT "Embedding the Metal kernels" VERBATIM)
    target_sources(${target} PRIVATE "${output}")
  endfunction()
  return()
endif()

cmake_minimum_required(VERSION 3.25)

set(first 0)
while(NOT CMAKE_ARGV${first} STREQUAL "--")
  math(EXPR first "${first} + 1")
endwhile()
math(EXPR first "${first} + 1")
math(EXPR last "${CMAKE_ARGC} - 1")

file(WRITE "${OUTPUT}" [[// Made by cmake/EmbedMetal.cmake.
#include "metal/texts.h"

#include <map>
#include <stdexcept>
#include <string>

namespace flash_attn::metal {

std::string_view source_file(std::string_view path) {
  static const std::map<std::string_view, std::string_view> files = {
]])
foreach(i RANGE ${first} ${last})
  file(READ "${CMAKE_ARGV${i}}" text)
  cmake_path(RELATIVE_PATH CMAKE_ARGV${i} BASE_DIRECTORY "${ROOT}" OUTPUT_VARIABLE path)
  file(APPEND "${OUTPUT}" "{\"${path}\", R\"metal(${text})metal\"},\n")
endforeach()
file(APPEND "${OUTPUT}" [[
  };
  const auto found = files.find(path);
  if (found == files.end()) throw std::logic_error("[flash_attn] no Metal source " + std::string(path));
  return found->second;
}

}  // namespace flash_attn::metal
]])
