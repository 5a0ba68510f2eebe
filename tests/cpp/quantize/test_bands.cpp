#include "quantize/bands.hpp"
#include "support.hpp"

namespace pyint8::testing {

TEST_CASE("bands are whole rows, in order, and hold every one") {
  for (const std::size_t rows : {1, 2, 7, 100}) {
    for (const std::size_t row_bytes : {1, 2, 100, 4097}) {
      for (const std::size_t most : {0, 1, 100, 250, 4096, 1000000}) {
        CAPTURE(rows);
        CAPTURE(row_bytes);
        CAPTURE(most);
        std::size_t row = 0;
        for (const Band& band : cut_into_bands(rows, row_bytes, most)) {
          REQUIRE(band.row == row);
          REQUIRE(band.rows > 0);
          REQUIRE(band.start == row * row_bytes);
          REQUIRE(band.nbytes == band.rows * row_bytes);
          REQUIRE((band.nbytes <= most || band.rows == 1));
          row += band.rows;
        }
        REQUIRE(row == rows);
      }
    }
  }
}

TEST_CASE("bands are as large as they may be") {
  const std::vector<Band> bands = cut_into_bands(10, 100, 450);
  REQUIRE(bands.size() == 3);
  CHECK(bands[0].rows == 4);
  CHECK(bands[1].rows == 4);
  CHECK(bands[2].rows == 2);
  CHECK(bands[2].start == 800);
}

TEST_CASE("a weight without rows or bytes has no bands") {
  CHECK(cut_into_bands(0, 100, 450).empty());
  CHECK(cut_into_bands(10, 0, 450).empty());
}

TEST_CASE("offsets are counted in 64 bits") {
  const std::size_t huge = std::size_t{3} << 30;
  const std::vector<Band> bands = cut_into_bands(4, huge, huge);
  REQUIRE(bands.size() == 4);
  CHECK(bands[3].start == 3 * huge);
}

}  // namespace pyint8::testing
