// The environment variables that steer a call, read at every call so that a test can set them.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace flash_attn::env {

inline std::string value_of(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// FLASH_ATTENTION_MLX_REF=1: every call goes to src/reference.
inline bool force_reference() {
  const std::string value = value_of("FLASH_ATTENTION_MLX_REF");
  if (value == "1") return true;
  if (value.empty() || value == "0") return false;
  throw std::invalid_argument("[flash_attn] FLASH_ATTENTION_MLX_REF: got '" + value + "', needs 0 or 1");
}

enum class RouteWish { automatic, sdpa, kernel };

/// FLASH_ATTENTION_MLX_ROUTE=auto, sdpa or kernel.
inline RouteWish route_wish() {
  const std::string value = value_of("FLASH_ATTENTION_MLX_ROUTE");
  if (value.empty() || value == "auto") return RouteWish::automatic;
  if (value == "sdpa") return RouteWish::sdpa;
  if (value == "kernel") return RouteWish::kernel;
  throw std::invalid_argument("[flash_attn] FLASH_ATTENTION_MLX_ROUTE: got '" + value + "', needs auto, sdpa or kernel");
}

}  // namespace flash_attn::env
