#include "quantize/bands.hpp"

#include <algorithm>

namespace pyint8 {

std::vector<Band> cut_into_bands(std::size_t rows, std::size_t row_bytes, std::size_t most) {
  std::vector<Band> bands;
  if (row_bytes == 0) return bands;
  const std::size_t step = std::max<std::size_t>(1, most / row_bytes);
  for (std::size_t row = 0; row < rows; row += step) {
    const std::size_t count = std::min(step, rows - row);
    bands.push_back({row, count, std::uint64_t{row} * row_bytes, count * row_bytes});
  }
  return bands;
}

}  // namespace pyint8
