#include <map>

#include "quantize/scratch.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kBlock = kScratchAlignment;

// Where a region of so many blocks starts, in blocks; -1 if there is no room.
int start_in(Scratch& scratch, std::size_t blocks) {
  const auto region = scratch.acquire(blocks * kBlock);
  return region ? static_cast<int>(scratch.start_of(*region) / kBlock) : -1;
}

}  // namespace

TEST_CASE("regions follow each other, aligned, until the buffer is full") {
  Scratch scratch(4 * kBlock + 7);
  CHECK(scratch.size() == 4 * kBlock);
  CHECK(scratch.start_of(*scratch.acquire(1)) == 0);
  CHECK(scratch.start_of(*scratch.acquire(kBlock + 1)) == kBlock);
  CHECK(scratch.start_of(*scratch.acquire(0)) == 3 * kBlock);
  CHECK_FALSE(scratch.acquire(1));
}

TEST_CASE("what is larger than the buffer never fits") {
  Scratch scratch(4 * kBlock);
  CHECK_FALSE(scratch.acquire(4 * kBlock + 1));
  CHECK_FALSE(scratch.acquire(~std::size_t{0}));
  CHECK(start_in(scratch, 4) == 0);
  CHECK_FALSE(Scratch(kBlock - 1).acquire(0));
}

TEST_CASE("regions go round: the end that is too small is left unused") {
  Scratch scratch(10 * kBlock);
  const auto a = scratch.acquire(4 * kBlock);
  const auto b = scratch.acquire(4 * kBlock);
  CHECK(start_in(scratch, 3) == -1);
  scratch.release(*a);
  CHECK(start_in(scratch, 3) == 0);
  CHECK(start_in(scratch, 2) == -1);  // one block is free before the oldest, two behind the newest but one
  CHECK(start_in(scratch, 1) == 3);
  scratch.release(*b);
  CHECK(start_in(scratch, 6) == 4);
}

TEST_CASE("a region that is released early is free once the older ones are too") {
  Scratch scratch(4 * kBlock);
  const auto a = scratch.acquire(2 * kBlock);
  const auto b = scratch.acquire(2 * kBlock);
  scratch.release(*b);
  CHECK(start_in(scratch, 1) == -1);
  scratch.release(*a);
  CHECK(start_in(scratch, 4) == 0);
}

TEST_CASE("regions never overlap and never leave the buffer") {
  Random random(3);
  Scratch scratch(32 * kBlock);
  std::map<Scratch::Region, std::size_t> live;  // sizes
  std::size_t refused = 0, acquired = 0;
  for (int step = 0; step < 20000; ++step) {
    const std::size_t nbytes = pick(random, 0, 9 * kBlock);
    const auto region = pick(random, 0, 2) > 0 ? scratch.acquire(nbytes) : std::nullopt;
    if (region) {
      ++acquired;
      const std::size_t start = scratch.start_of(*region);
      REQUIRE(start % kBlock == 0);
      REQUIRE(start + nbytes <= scratch.size());
      for (const auto& [other, size] : live) {
        const std::size_t from = scratch.start_of(other);
        REQUIRE((start + nbytes <= from || from + size <= start));
      }
      live[*region] = nbytes;
    } else if (!live.empty()) {
      ++refused;
      auto which = live.begin();
      std::advance(which, pick(random, 0, std::min<std::size_t>(live.size() - 1, 2)));
      scratch.release(which->first);
      live.erase(which);
    }
  }
  CHECK(acquired > 5000);
  CHECK(refused > 1000);
}

}  // namespace pyint8::testing
