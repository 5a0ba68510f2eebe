// Lets each call of the driver fail in turn, and looks at what is left.
#pragma once

#include <functional>
#include <memory>

#include "cuda_support.hpp"

namespace pyint8::testing {

// Something that makes calls. It and its callers outlive the work, as torch does.
class Load {
 public:
  virtual ~Load() = default;
  virtual void run() = 0;
  // Of the callers' streams.
  virtual void synchronize() = 0;
  virtual bool arrived() const = 0;
};

// From 1 on: the 1st, 2nd, 3rd, 5th, 8th ... and the last three; all of them with PYINT8_TEST_EVERY_FAULT=1.
std::vector<std::size_t> some_up_to(std::size_t last);

// Runs loads in which one call fails, of every entry point and each of `some_up_to`; with
// PYINT8_TEST_EVERY_FAULT=1 in every way. Whatever happens must be kDriver with the driver's words or
// success, and nothing may be left. Returns how many did not succeed.
std::size_t fail_each_call(const std::function<std::unique_ptr<Load>()>& make);

}  // namespace pyint8::testing
