// What all targets share. Assertions of the tests' support are outside of any test here: the first that fails
// ends the process.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "input.hpp"

namespace {

void fail(const doctest::AssertData& data) {
  pyint8::testing::require(!data.m_failed, data.m_expr);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  static doctest::Context context;
  context.setAsDefaultForAssertsOutOfTestCases();
  context.setAssertHandler(fail);
  ::setenv("FAKE_CUDA_DELAY_US", "0", 1);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  pyint8::testing::Input input(data, size);
  pyint8::testing::fuzz(input);
  return 0;
}
