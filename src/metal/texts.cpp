#include "metal/texts.h"

#include <algorithm>
#include <stdexcept>

#include "metal/text/conditionals.h"
#include "metal/text/macros.h"
#include "metal/text/reachable.h"
#include "metal/text/short_names.h"
#include "metal/text/tokens.h"

namespace flash_attn::metal {
namespace {

Tokens joined(const Tokens& first, const Tokens& second) {
  Tokens all = first;
  all.insert(all.end(), second.begin(), second.end());
  return all;
}

/// One around all that the files put into theirs.
Tokens in_our_namespace(const Tokens& functions) {
  return joined(joined(tokens_of("namespace flash_attn {"), functions), tokens_of("\n}"));
}

struct Parts {
  Tokens functions;
  Tokens body;
};

Parts parts_of(const Tokens& file) {
  const auto marker = std::find_if(file.begin(), file.end(), [](const Token& token) { return token.text == "FA_BODY"; });
  if (marker == file.end()) throw std::logic_error("[flash_attn] a Metal file without FA_BODY");
  const Tokens body(marker + 1, file.end());
  return {in_our_namespace(reachable({file.begin(), marker}, body)), body};
}

/// Of arrays, and of what MLX says of them where a body asks for it.
std::vector<std::string> names_in_signature(const Kernel& kernel) {
  std::vector<std::string> names = kernel.outputs;
  for (const std::string& array : kernel.inputs) {
    for (const char* part : {"", "_shape", "_strides", "_ndim"}) names.push_back(array + part);
  }
  return names;
}

}  // namespace

Text text_of(const Kernel& kernel) {
  const Tokens file = resolved("metal/" + kernel.file + ".metal", kernel.defines, source_file);
  if (kernel.is_readable) {
    const auto [functions, body] = parts_of(file);
    return {kernel.defines + as_read(functions), as_read(body)};
  }
  const auto [functions, body] = parts_of(with_values(joined(tokens_of(kernel.defines), file)));
  const std::vector<std::string> in_signature = names_in_signature(kernel);
  const auto names = short_names(joined(functions, body), {in_signature.begin(), in_signature.end()});
  return {squeezed(functions, names), squeezed(body, names)};
}

}  // namespace flash_attn::metal
