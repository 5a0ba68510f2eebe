#include "engine_support.hpp"

#include <algorithm>

#include "memory.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kGuard = 8;
constexpr std::byte kUntouched{0x5a};

}  // namespace

Checkpoint::Checkpoint(const std::vector<std::size_t>& sizes) {
  for (const std::size_t size : sizes) {
    contents.push_back(random_bytes(size, size + contents.size()));
    files.emplace_back(contents.back());
  }
}

void Checkpoint::open(Engine& engine) const {
  for (const TempFile& file : files) engine.add_file(file.path());
}

Reads::Reads(const Checkpoint& checkpoint, Random& random, std::size_t count, std::size_t largest)
    : checkpoint_(checkpoint) {
  std::uint32_t file = 0;
  std::size_t offset = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (pick(random, 0, 9) == 0) {
      file = static_cast<std::uint32_t>(pick(random, 0, checkpoint.files.size() - 1));
      offset = pick(random, 0, checkpoint.contents[file].size());
    }
    const std::size_t size = checkpoint.contents[file].size();
    offset = std::min(size, offset + pick(random, 0, 1) * pick(random, 0, 100));
    const std::size_t wanted = pick(random, 0, 7) == 0 ? 0 : pick(random, 1, pick(random, 1, largest));
    const std::size_t nbytes = std::min(wanted, size - offset);
    destinations_.emplace_back(nbytes + 2 * kGuard, kUntouched);
    const auto to = reinterpret_cast<Address>(destinations_.back().data() + kGuard);  // moves with the vector
    reads_.push_back({{file, offset, nbytes}, to});
    offset = offset + nbytes == size ? 0 : offset + nbytes;
  }
}

std::size_t Reads::nbytes() const {
  std::size_t sum = 0;
  for (const Read& read : reads_) sum += read.range.nbytes;
  return sum;
}

bool Reads::arrived(std::size_t index) const {
  const Range& range = reads_[index].range;
  const Bytes& content = checkpoint_.contents[range.file];
  const std::span<const std::byte> got(destinations_[index]);
  const auto untouched = [](std::span<const std::byte> bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == kUntouched; });
  };
  return std::equal(got.begin() + kGuard, got.end() - kGuard,
                    content.begin() + static_cast<std::ptrdiff_t>(range.offset)) &&
         untouched(got.first(kGuard)) && untouched(got.last(kGuard));
}

bool Reads::arrived() const {
  for (std::size_t i = 0; i < reads_.size(); ++i) {
    if (!arrived(i)) return false;
  }
  return true;
}

void wait_for(Engine& engine, Ticket ticket, StreamHandle stream) {
  const bool came = engine.wait(ticket, stream, kPatience);  // apart, so that an Error passes through
  const Unrefused assertion;
  REQUIRE_MESSAGE(came, "ticket " << ticket);
}

}  // namespace pyint8::testing
