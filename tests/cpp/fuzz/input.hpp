// The bytes that a fuzzer gives, as choices; and how a target says what it has found.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>

namespace pyint8::testing {

// Once it is used up, every choice is the first.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : left_(data, size) {}

  bool empty() const { return left_.empty(); }

  template <typename Number>
  Number number() {
    Number value = 0;
    for (std::size_t i = 0; i < sizeof value; ++i) {
      value = static_cast<Number>(value | static_cast<Number>(byte()) << (8 * i));
    }
    return value;
  }
  // From `low` to `high`, both included.
  std::size_t pick(std::size_t low, std::size_t high) {
    const std::size_t choices = high - low + 1;
    return low + (choices <= 256 ? byte() : number<std::uint32_t>()) % choices;
  }
  // One time in so many, where the bytes are random.
  bool once_in(std::size_t many) { return pick(0, many - 1) == many - 1; }
  template <typename Choice, std::size_t kCount>
  Choice among(const Choice (&choices)[kCount]) {
    return choices[pick(0, kCount - 1)];
  }

 private:
  std::uint8_t byte() {
    if (left_.empty()) return 0;
    const std::uint8_t value = left_.front();
    left_ = left_.subspan(1);
    return value;
  }

  std::span<const std::uint8_t> left_;
};

// Ends the process, as a sanitizer does, so that a fuzzer keeps the input.
inline void require(bool condition, const std::string& rule) {
  if (condition) return;
  std::fprintf(stderr, "broken: %s\n", rule.c_str());
  std::abort();
}

// A target: does with the code under test what the input says, and requires what must hold.
void fuzz(Input& input);

}  // namespace pyint8::testing

// What a fuzzer calls, once at the start and once for each input: libFuzzer's own names.
extern "C" int LLVMFuzzerInitialize(int* count, char*** arguments);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
