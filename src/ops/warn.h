// What a caller should know but need not act on.
#pragma once

#include <functional>
#include <string>

namespace flash_attn {

using WarningSink = std::function<void(const std::string&)>;

/// Where warnings go; at first to standard error. Python makes them RuntimeWarnings.
void set_warning_sink(WarningSink sink);

/// The first time that `message` comes up.
void warn_once(const std::string& message);

/// For tests: every message is new again.
void forget_warnings();

}  // namespace flash_attn
