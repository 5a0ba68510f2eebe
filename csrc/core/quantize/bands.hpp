// A weight in bands of rows, so that what passes through scratch is small however large the weight: pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyint8 {

struct Band {
  std::size_t row;  // the first
  std::size_t rows;
  std::uint64_t start;  // in bytes, from the first row
  std::size_t nbytes;
};

// Cuts `rows` rows of `row_bytes` into bands of at most `most` bytes, of a row at least. Rows are independent
// of each other in LLM.int8(), so bands give the same bytes as the whole. None where there are no rows or no
// bytes.
std::vector<Band> cut_into_bands(std::size_t rows, std::size_t row_bytes, std::size_t most);

}  // namespace pyint8
