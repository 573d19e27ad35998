# Which src/cpu/levels/*.cpp this processor family builds, and each one's instruction set.
#
# A level's file is named after it. LEVEL_tiles has the tile shapes of LEVEL in baseline instructions: tests only, so that it
# compiles soon counts for more than that it runs fast.
set(isa_flags_avx2 -mavx2 -mfma -mf16c)
set(isa_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl ${isa_flags_avx2})
set(isa_flags_avx512_bf16 -mavx512bf16 -mavx512vnni ${isa_flags_avx512})
set(isa_flags_avx512_amx ${isa_flags_avx512_bf16}) # the tile instructions are written as assembly

# Kernels compare and select on NaN and inf, so no -ffast-math; but nobody reads errno or the floating-point exception flags.
# -Wno-psabi: vectors wider than the level's registers never cross a function boundary that is not inlined.
set(level_flags -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND level_flags -Wno-maybe-uninitialized -Wno-uninitialized) # false alarms inside GCC 12's own avx512fintrin.h
endif()

set(tile_level_flags -O1 -DFA_INLINE_LESS)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND tile_level_flags -fdisable-tree-cunrolli -fdisable-tree-cunroll) # whatever the source asks to unroll
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(isa_levels baseline avx2)
  if(FLASH_ATTN_AVX512)
    list(APPEND isa_levels avx512 avx512_bf16 avx512_amx)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(isa_levels baseline neon)
else()
  set(isa_levels baseline)
endif()

# Adds the level files in `folder` to `target`, each compiled for its own instruction set.
function(add_isa_levels target folder)
  file(GLOB level_sources CONFIGURE_DEPENDS "${folder}/*.cpp")
  foreach(source IN LISTS level_sources)
    cmake_path(GET source STEM level)
    if(level IN_LIST isa_levels)
      set(flags ${level_flags} ${isa_flags_${level}})
    elseif(FLASH_ATTN_TILE_LEVELS AND level MATCHES "_tiles$")
      set(flags ${level_flags} ${tile_level_flags})
    else()
      continue()
    endif()
    target_sources(${target} PRIVATE "${source}")
    set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
endfunction()
