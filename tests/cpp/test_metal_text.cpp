// From the sources of a Metal kernel to the text that MLX gets.

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

#include "metal/text/conditionals.h"
#include "metal/text/macros.h"
#include "metal/text/reachable.h"
#include "metal/text/short_names.h"
#include "metal/text/tokens.h"
#include "metal/texts.h"

namespace flash_attn::metal {
namespace {

std::string squeezed(std::string_view text) { return squeezed(tokens_of(text), {}); }

std::string resolved_text(const std::string& file, std::string_view defines = "") {
  return squeezed(resolved("file", defines, [&](std::string_view) -> std::string_view { return file; }), {});
}

TEST(MetalText, SpacesStayWhereTokensWouldJoin) {
  EXPECT_EQ(squeezed("const  int i = a - -b + +c; // why"), "const int i=a- -b+ +c;\n");
  EXPECT_EQ(squeezed("x = y / *p * 1e-7f + 0x1Eu-2;"), "x=y/ *p*1e-7f+0x1Eu-2;\n");
  EXPECT_EQ(squeezed("vec<vec<T, 2>, 2> v >> 1;"), "vec<vec<T,2>,2>v>>1;\n");
  EXPECT_EQ(squeezed("call(\n    a,\n    b);\nreturn \"two  words\";"), "call(a,b);return\"two  words\";\n");
  EXPECT_EQ(squeezed("int a;\n#define FA_M _Pragma(\"x\") 1\nFA_M for"), "int a;\n#define FA_M _Pragma(\"x\") 1\nFA_M for\n");
}

TEST(MetalText, LinesAreNeitherShortNorEndless) {
  std::string text;
  for (int i = 0; i < 40; ++i) text += "int a" + std::to_string(10 + i) + " = 0;\n";  // 10 characters each
  const std::string lines = squeezed(text);
  EXPECT_EQ(lines.size(), 40 * 10 + 5u);
  EXPECT_EQ(lines.find('\n'), 80u);
}

TEST(MetalText, ABarrierHasALineOfItsOwn) {
  EXPECT_EQ(squeezed("a();\nthreadgroup_barrier(b);\nx = simd_max(\n    y);\nz = simd_sum(x);\nreturn z;"),
            "a();threadgroup_barrier(b);\nx=simd_max(y);\nz=simd_sum(x);\nreturn z;\n");
}

TEST(MetalText, OfAConditionOneBranchStays) {
  const std::string text = "#ifdef FA_A\na\n#elif FA_B > 1 && !defined(FA_C)\nb\n#else\nc\n#endif\n";
  EXPECT_EQ(resolved_text(text, "#define FA_A 1\n#define FA_B 2\n"), "a\n");
  EXPECT_EQ(resolved_text(text, "#define FA_B 2\n"), "b\n");
  EXPECT_EQ(resolved_text(text, "#define FA_B 2\n#define FA_C 1\n"), "c\n");
  EXPECT_EQ(resolved_text(text), "c\n");
}

TEST(MetalText, BranchesInABranchThatIsNotSeenAreNot) {
  EXPECT_EQ(resolved_text("#ifdef FA_A\n#if 1\na\n#else\nb\n#endif\n#define FA_D\n#else\nc\n#endif\n#ifdef FA_D\nd\n#endif\n"),
            "c\n");
  EXPECT_EQ(resolved_text("#if (FA_A || FA_B == 3) && defined FA_B\na\n#endif\n", "#define FA_B 3\n"), "a\n");
  EXPECT_EQ(resolved_text("#if defined(__METAL_VERSION__)\na\n#endif\n"), "a\n");
}

TEST(MetalText, AFileIsIncludedOnceAndForeignOnesNever) {
  const std::map<std::string_view, std::string_view> files = {{"a", "#pragma once\n#include \"b\"\n#include \"c\"\na\n"},
                                                              {"b", "#include \"c\"\n#include <math.h>\nb\n"},
                                                              {"c", "c\n"}};
  EXPECT_EQ(squeezed(resolved("a", "", [&](std::string_view path) { return files.at(path); }), {}), "c b a\n");
}

TEST(MetalText, WhatIsNotUnderstoodIsRefused) {
  EXPECT_THROW(resolved_text("#if FA_A + 1\na\n#endif\n"), std::logic_error);
  EXPECT_THROW(resolved_text("#if (FA_A\na\n#endif\n"), std::logic_error);
  EXPECT_THROW(resolved_text("a\n#endif\n"), std::logic_error);
  EXPECT_THROW(resolved_text("#define FA_TWICE(x) x x\n"), std::logic_error);
  EXPECT_EQ(resolved_text("#define FA_ONE (1)\n"), "#define FA_ONE (1)\n");
}

TEST(MetalText, MacrosGiveWayToTheirValues) {
  const std::string text =
      "#define FA_D 64\n#define FA_T half\n#define FA_HALF FA_D / 2\n#define FA_UNROLL _Pragma(\"clang loop unroll(full)\")\n"
      "FA_UNROLL\nfor (FA_T x : FA_HALF) FA_D2;\n";
  EXPECT_EQ(squeezed(with_values(tokens_of(text)), {}),
            "#define FA_UNROLL _Pragma(\"clang loop unroll(full)\")\nFA_UNROLL for(half x:64/2)FA_D2;\n");
}

TEST(MetalText, AValueIsATokenOfItsOwn) {
  EXPECT_EQ(squeezed(with_values(tokens_of("#define FA_LEFT -1\nx = a -FA_LEFT;\n")), {}), "x=a- -1;\n");
}

TEST(MetalText, OnlyWhatTheBodyReachesStays) {
  const std::string declarations =
      "namespace flash_attn {\n"
      "struct Used { int a; int b[2]; int called() { return a; } int never() { return unused_constant; } };\n"
      "template <class A, class B = Outer<Inner<A>>> int direct(A a) { return indirect(a); }\n"
      "int indirect(int a) { return constant_of_it; }\n"
      "int indirect(Used a) { return 0; }\n"
      "}\nnamespace flash_attn {\n"
      "constant constexpr int constant_of_it = f(2);\n"
      "constant constexpr int unused_constant = 3;\n"
      "struct Unused { int direct() { return 1; } };\n"
      "using Alias = Unused;\n"
      "enum Kept : int { one };\n"
      "}\n";
  EXPECT_EQ(squeezed(reachable(tokens_of(declarations), tokens_of("Used u; u.called(); direct(u);")), {}),
            "struct Used{int a;int b[2];int called(){return a;}};"
            "template<class A,class B=Outer<Inner<A>>>int direct(A a){return indirect(a);}\n"
            "int indirect(int a){return constant_of_it;}"
            "int indirect(Used a){return 0;}"
            "constant constexpr int constant_of_it=f(2);\n"
            "enum Kept:int{one};\n");
}

TEST(MetalText, NamesAreShortButForWordsOfMetalAndOfTheSignature) {
  const Tokens text = tokens_of("FA_UNROLL device float q_strides = often + often + often + rarely + metal::simd_sum(a) + x;");
  const auto names = short_names(text, {"q_strides"});
  EXPECT_EQ(squeezed(text, names), "FA_b device float q_strides=a+a+a+d+metal::simd_sum(c)+x;\n");
}

TEST(MetalText, ManyNamesAreAllDifferent) {
  std::string many;
  for (int i = 0; i < 3000; ++i) many += "name" + std::to_string(i) + " ";
  const auto names = short_names(tokens_of(many), {});
  std::set<std::string> short_ones;
  for (const auto& [name, short_name] : names) {
    EXPECT_LE(short_name.size(), 3u);
    EXPECT_FALSE(is_foreign(short_name)) << short_name;
    short_ones.insert(short_name);
  }
  EXPECT_EQ(short_ones.size(), 3000u);
}

Kernel delta(bool is_readable) {
  return {.name = "delta",
          .file = "delta",
          .inputs = {"params", "out", "dout", "dlse"},
          .outputs = {"delta"},
          .defines = "#define FA_T half\n#define FA_DV 64\n#define FA_SIMDGROUPS 4\n",
          .is_readable = is_readable,
          .params = {},
          .threadgroup = {},
          .threadgroups = {}};
}

TEST(MetalText, AReadableTextHasTheNamesOfTheSources) {
  const Text readable = text_of(delta(true));
  EXPECT_NE(readable.functions.find("FA_FN float row_dot("), std::string::npos);
  EXPECT_NE(readable.body.find("delta[i] = dot - dlse[i];"), std::string::npos);
  const Text sent = text_of(delta(false));
  EXPECT_EQ(sent.functions.find("row_dot"), std::string::npos);
  EXPECT_NE(sent.body.find("dlse["), std::string::npos) << "MLX's signature has that name";
  EXPECT_LT(sent.functions.size() + sent.body.size(), (readable.functions.size() + readable.body.size()) / 2);
}

TEST(MetalText, AKernelThatIsNotThereIsNamed) {
  Kernel kernel = delta(false);
  kernel.file = "no_such_kernel";
  EXPECT_THROW(text_of(kernel), std::logic_error);
  kernel.file = "tile";
  EXPECT_THROW(text_of(kernel), std::logic_error) << "vocabulary, no kernel";
}

}  // namespace
}  // namespace flash_attn::metal
