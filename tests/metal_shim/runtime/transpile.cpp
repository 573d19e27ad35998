// The two things that headers cannot do: threadgroup arrays get memory of their own, and a kernel's attributed parameters
// become the arguments of a call.
#include <algorithm>
#include <cctype>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

#include "metal_shim.h"

namespace metal_shim {
namespace {

[[noreturn]] void reject(const std::string& message) { throw Fault(FaultKind::compile, message); }

/// `threadgroup T name[N][M];` -> `auto& name = metal_shim::threadgroup_array<T[N][M]>("name");`
std::string with_threadgroup_arrays(const std::string& text) {
  static const std::regex array(R"(\bthreadgroup\s+(\w[\w:<>]*)\s+(\w+)\s*((?:\[[^;]*\])+)\s*;)");
  static const std::regex attribute(R"(\[\[\s*threadgroup\(\d+\)\s*\]\])");  // `threadgroup` is a macro here
  const std::string arrays = std::regex_replace(text, array, "auto& $2 = metal_shim::threadgroup_array<$1$3>(\"$2\");");
  return std::regex_replace(arrays, attribute, "");
}

/// Where the bracket at `open` closes.
std::size_t closing(std::string_view text, std::size_t open) {
  int depth = 0;
  for (std::size_t i = open; i < text.size(); ++i) {
    if (text[i] == '(' || text[i] == '[' || text[i] == '{') ++depth;
    if (text[i] == ')' || text[i] == ']' || text[i] == '}') {
      if (--depth == 0) return i;
    }
  }
  reject("unbalanced brackets");
}

std::vector<std::string> split_at_commas(std::string_view list) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : list) {
    if (c == '(' || c == '[' || c == '<') ++depth;
    if (c == ')' || c == ']' || c == '>') --depth;
    if (c == ',' && depth == 0) {
      parts.push_back(part);
      part.clear();
    } else {
      part += c;
    }
  }
  if (part.find_first_not_of(" \t\n") != std::string::npos) parts.push_back(part);
  return parts;
}

std::string without_comments(const std::string& text) {
  std::string code;
  for (std::size_t i = 0; i < text.size();) {
    const bool line = text.compare(i, 2, "//") == 0;
    const bool block = text.compare(i, 2, "/*") == 0;
    if (!line && !block) {
      code += text[i++];
      continue;
    }
    const std::size_t end = text.find(line ? "\n" : "*/", i);
    i = end == std::string::npos ? text.size() : end + (line ? 0 : 2);
  }
  return code;
}

/// The parameter list of a kernel, wherever in the text it is defined.
std::string parameters_of(const std::string& text, const std::string& name) {
  for (std::size_t at = text.find(name); at != std::string::npos; at = text.find(name, at + 1)) {
    const bool starts_word = at > 0 && std::isspace(static_cast<unsigned char>(text[at - 1])) != 0;
    std::size_t open = at + name.size();
    while (open < text.size() && std::isspace(static_cast<unsigned char>(text[open])) != 0) ++open;
    if (!starts_word || open >= text.size() || text[open] != '(') continue;
    const std::size_t close = closing(text, open);
    const std::size_t next = text.find_first_not_of(" \t\n", close + 1);
    if (next != std::string::npos && text[next] == '{') return text.substr(open + 1, close - open - 1);
  }
  reject("the text has no kernel " + name);
}

const std::regex buffer(R"(\[\[[^\]]*\bbuffer\((\d+)\)[^\]]*\]\])");

std::string argument_for(const std::string& parameter) {
  static const std::regex attribute(R"(\[\[\s*(\w+)\s*\]\])");
  std::smatch match;
  if (std::regex_search(parameter, match, buffer)) {
    const bool reference = parameter.find('&') != std::string::npos;
    return std::string("metal_shim::") + (reference ? "buffer_reference" : "buffer_pointer") + "(t, " + match[1].str() + ")";
  }
  if (std::regex_search(parameter, match, attribute)) return "metal_shim::position(t." + match[1].str() + ")";
  reject("a parameter without [[attribute]]: " + parameter);
}

}  // namespace

std::size_t buffers_of(const std::string& text, const std::string& function) {
  std::size_t count = 0;
  const std::string parameters = parameters_of(without_comments(text), function.substr(0, function.find('<')));
  for (std::sregex_iterator match(parameters.begin(), parameters.end(), buffer), none; match != none; ++match) {
    count = std::max<std::size_t>(count, std::stoul((*match)[1]) + 1);
  }
  return count;
}

std::string transpile(const std::string& text, const std::string& function) {
  const std::string name = function.substr(0, function.find('<'));
  std::string call;
  for (const std::string& parameter : split_at_commas(parameters_of(without_comments(text), name))) {
    call += (call.empty() ? "" : ", ") + argument_for(parameter);
  }
  return "#include \"msl/mlx.h\"\n#include \"msl/arguments.h\"\n#line 1 \"" + name + ".metal\"\n" +
         with_threadgroup_arrays(text) +
         "\n#line 1 \"entry\"\nextern \"C\" void metal_shim_kernel(const metal_shim::Thread& t) {\n  " + function + "(" + call +
         ");\n}\n";
}

}  // namespace metal_shim
