# The texts of the Metal kernels as C++: embed_metal(target folder) adds a source that defines text_of() of src/metal/texts.h.
#
# A .metal file has its functions first, then a line FA_BODY, then the body of its kernel; one without that line is vocabulary
# for the others. Run as a script, this file turns them into OUTPUT: every #include "..." once, in place; no <headers>, no
# comments, no blank lines, no indentation; of `#if defined(__METAL_VERSION__)` only the branch that Metal sees.

if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(EMBED_METAL_SCRIPT "${CMAKE_CURRENT_LIST_FILE}")

  function(embed_metal target folder)
    cmake_path(GET folder PARENT_PATH root)
    file(GLOB texts CONFIGURE_DEPENDS "${folder}/*.metal" "${folder}/*.h" "${root}/semantics/*.h")
    set(output "${CMAKE_CURRENT_BINARY_DIR}/metal_texts.cpp")
    add_custom_command(
      OUTPUT "${output}"
      COMMAND "${CMAKE_COMMAND}" -D "FOLDER=${folder}" -D "ROOT=${root}" -D "OUTPUT=${output}" -P "${EMBED_METAL_SCRIPT}"
      DEPENDS ${texts} "${EMBED_METAL_SCRIPT}"
      COMMENT "Embedding the Metal kernels" VERBATIM)
    target_sources(${target} PRIVATE "${output}")
  endfunction()
  return()
endif()

cmake_minimum_required(VERSION 3.25)

# Characters that mean something to CMake's lists travel as control characters.
string(ASCII 1 semicolon)
foreach(code RANGE 2 4)
  string(ASCII ${code} stand_in)
  list(APPEND stand_ins "${stand_in}")
endforeach()

function(read_lines path result)
  file(READ "${path}" text)
  string(REPLACE ";" "${semicolon}" text "${text}")
  foreach(index RANGE 2)
    string(SUBSTRING "[]\\" ${index} 1 character)
    list(GET stand_ins ${index} stand_in)
    string(REPLACE "${character}" "${stand_in}" text "${text}")
  endforeach()
  string(REPLACE "\n" ";" lines "${text}")
  set(${result} "${lines}" PARENT_SCOPE)
endfunction()

# Appends the lines of `path` to the global `flattened`, unless it was there already.
function(flatten path)
  get_property(seen GLOBAL PROPERTY seen_files)
  if(path IN_LIST seen)
    return()
  endif()
  set_property(GLOBAL APPEND PROPERTY seen_files "${path}")
  read_lines("${path}" lines)
  set(depth 0) # of the #else branch that Metal does not see
  set(metal_depth 0) # of the branch that it sees
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "//.*$" "" line "${line}")
    string(STRIP "${line}" line)
    if(depth GREATER 0)
      if(line MATCHES "^#if")
        math(EXPR depth "${depth} + 1")
      elseif(line MATCHES "^#endif")
        math(EXPR depth "${depth} - 1")
      endif()
    elseif(line MATCHES "^#if defined\\(__METAL_VERSION__\\)")
      set(metal_depth 1)
    elseif(metal_depth EQUAL 1 AND line MATCHES "^#else")
      set(metal_depth 0)
      set(depth 1)
    elseif(metal_depth EQUAL 1 AND line MATCHES "^#endif")
      set(metal_depth 0)
    elseif(line MATCHES "^#include \"(.*)\"")
      flatten("${ROOT}/${CMAKE_MATCH_1}")
    elseif(NOT line STREQUAL "" AND NOT line MATCHES "^#(include|pragma once)")
      if(metal_depth GREATER 0 AND line MATCHES "^#if")
        math(EXPR metal_depth "${metal_depth} + 1")
      elseif(metal_depth GREATER 1 AND line MATCHES "^#endif")
        math(EXPR metal_depth "${metal_depth} - 1")
      endif()
      set_property(GLOBAL APPEND_STRING PROPERTY flattened "${line}\n")
    endif()
  endforeach()
endfunction()

set(definitions "")
set(table "")
file(GLOB paths "${FOLDER}/*.metal")
foreach(path IN LISTS paths)
  cmake_path(GET path STEM kernel)
  set_property(GLOBAL PROPERTY seen_files "")
  set_property(GLOBAL PROPERTY flattened "")
  flatten("${path}")
  get_property(text GLOBAL PROPERTY flattened)
  string(REPLACE "${semicolon}" ";" text "${text}")
  foreach(index RANGE 2)
    string(SUBSTRING "[]\\" ${index} 1 character)
    list(GET stand_ins ${index} stand_in)
    string(REPLACE "${stand_in}" "${character}" text "${text}")
  endforeach()
  string(FIND "${text}" "FA_BODY\n" body)
  if(body LESS 0)
    continue()
  endif()
  string(SUBSTRING "${text}" 0 ${body} header)
  math(EXPR body "${body} + 8")
  string(SUBSTRING "${text}" ${body} -1 source)
  string(APPEND table "    {\"${kernel}\", {R\"metal(${header})metal\", R\"metal(${source})metal\"}},\n")
endforeach()

file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT [[// Made by cmake/EmbedMetal.cmake.
#include "metal/texts.h"

#include <map>
#include <stdexcept>
#include <string>

namespace flash_attn::metal {

const Text& text_of(std::string_view kernel) {
  static const std::map<std::string_view, Text> texts = {
@table@  };
  const auto found = texts.find(kernel);
  if (found == texts.end()) throw std::logic_error("[flash_attn] no Metal kernel " + std::string(kernel));
  return found->second;
}

}  // namespace flash_attn::metal
]] @ONLY)
