// The parts of the module, a file each.
#pragma once

#include <nanobind/nanobind.h>

void bind_kv_cache(nanobind::module_& module);
