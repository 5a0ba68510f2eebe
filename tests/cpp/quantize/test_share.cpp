// Which of its bytes each rank reads.
#include <doctest/doctest.h>

#include <vector>

#include "error.hpp"
#include "quantize/share.hpp"

namespace pyint8::testing {

TEST_CASE("parts of all ranks, and what is behind them, cover every byte once") {
  for (const std::uint32_t ranks : {2, 3, 8}) {
    for (const std::size_t nbytes : {std::size_t{0}, std::size_t{1}, std::size_t{99}, std::size_t{100},
                                     std::size_t{1000}, std::size_t{4096}, std::size_t{4127}}) {
      CAPTURE(ranks);
      CAPTURE(nbytes);
      const std::size_t part = Share{0, ranks, 100}.part_of(nbytes);
      CHECK(part % 16 == 0);
      CHECK((part == 0) == (nbytes < 100 || nbytes < ranks * 16));
      std::vector<std::uint32_t> readers(nbytes);
      for (std::uint32_t rank = 0; rank < ranks; ++rank) {
        for (const auto [begin, end, is_part] : Share{rank, ranks, 100}.spans_of(nbytes)) {
          CHECK(is_part == (begin < ranks * part));
          for (std::size_t byte = begin; byte < end; ++byte) ++readers[byte];
        }
      }
      for (std::size_t byte = 0; byte < nbytes; ++byte) {
        CHECK(readers[byte] == (byte < ranks * part ? 1 : ranks));
      }
    }
  }
}

TEST_CASE("one rank alone reads everything, whole") {
  CHECK(Share{}.part_of(std::size_t{1} << 30) == 0);
  REQUIRE(Share{}.spans_of(77).size() == 1);
  CHECK(Share{}.spans_of(77)[0].end == 77);
  CHECK(!Share{}.spans_of(77)[0].is_part);
}

TEST_CASE("a rank that there is not") {
  CHECK_THROWS_AS(validate(Share{2, 2, 0}), Error);
  CHECK_THROWS_AS(validate(Share{0, 0, 0}), Error);
  CHECK_NOTHROW(validate(Share{1, 2, 0}));
}

}  // namespace pyint8::testing
