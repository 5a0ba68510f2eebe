// Where there is no libFuzzer: gives a target the inputs of a corpus, and changed ones, the same at each run.
//
// fuzz_plan CORPUS CHANGED: a file with an input a line, in hexadecimal, lines that begin with # apart; how
// many changed inputs to add to them.
#include <csignal>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "input.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;
using Random = std::mt19937_64;

std::vector<Bytes> inputs_in(const char* path) {
  std::vector<Bytes> inputs;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with('#')) continue;
    Bytes& bytes = inputs.emplace_back();
    for (std::size_t i = 0; i + 1 < line.size(); i += 2) {
      bytes.push_back(static_cast<std::uint8_t>(std::stoi(line.substr(i, 2), nullptr, 16)));
    }
  }
  return inputs;
}

std::size_t below(Random& random, std::size_t end) {
  return std::uniform_int_distribution<std::size_t>(0, end - 1)(random);
}

// With some bytes changed, cut, or another input's end.
Bytes changed(const std::vector<Bytes>& inputs, Random& random) {
  constexpr std::uint8_t kTelling[] = {0, 1, 2, 0x7f, 0x80, 0xff};
  Bytes bytes = inputs[below(random, inputs.size())];
  if (below(random, 4) == 0) {
    const Bytes& other = inputs[below(random, inputs.size())];
    bytes.resize(below(random, bytes.size() + 1));
    bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(below(random, other.size() + 1)),
                 other.end());
  }
  for (std::size_t changes = below(random, 6); changes > 0 && !bytes.empty(); --changes) {
    std::uint8_t& byte = bytes[below(random, bytes.size())];
    byte = below(random, 2) == 0 ? static_cast<std::uint8_t>(random())
                                 : kTelling[below(random, std::size(kTelling))];
  }
  return bytes;
}

const Bytes* current = nullptr;

void print_current(int) {
  for (const std::uint8_t byte : *current) std::fprintf(stderr, "%02x", byte);
  std::fprintf(stderr, "\n");
  std::_Exit(1);
}

void run(const Bytes& bytes) {
  current = &bytes;
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

// So that the input is printed, whoever finds fault with what it does.
extern "C" const char* __asan_default_options() {
  return "abort_on_error=1";
}

int main(int count, char** arguments) {
  std::signal(SIGABRT, print_current);
  LLVMFuzzerInitialize(&count, &arguments);
  const std::vector<Bytes> inputs = inputs_in(arguments[1]);
  pyint8::testing::require(!inputs.empty(), std::string(arguments[1]) + " has inputs");
  for (const Bytes& bytes : inputs) run(bytes);
  Random random(1);
  const int more = std::atoi(arguments[2]);
  for (int i = 0; i < more; ++i) run(changed(inputs, random));
  std::printf("%zu inputs and %d changed ones\n", inputs.size(), more);
}
