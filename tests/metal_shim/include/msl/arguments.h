// A kernel's arguments, converted to whatever its parameters are.
#pragma once

#include "msl/abi.h"
#include "msl/vec.h"

namespace metal_shim {

struct PointerArgument {
  void* data;
  template <class T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

struct ReferenceArgument {
  void* data;
  template <class T>
  operator T&() const {
    return *static_cast<T*>(data);
  }
};

inline PointerArgument buffer_pointer(const Thread& t, int slot) { return {t.buffers[slot]}; }
inline ReferenceArgument buffer_reference(const Thread& t, int slot) { return {t.buffers[slot]}; }

struct PositionArgument {
  const uint32_t* position;
  template <class T>
  requires is_integer<T>
  operator T() const { return static_cast<T>(position[0]); }
  template <class T>
  operator metal::vec<T, 2>() const {
    return {static_cast<T>(position[0]), static_cast<T>(position[1])};
  }
  template <class T>
  operator metal::vec<T, 3>() const {
    return {static_cast<T>(position[0]), static_cast<T>(position[1]), static_cast<T>(position[2])};
  }
};

inline PositionArgument position(const uint32_t (&p)[3]) { return {p}; }
inline PositionArgument position(const uint32_t& index) { return {&index}; }

}  // namespace metal_shim
