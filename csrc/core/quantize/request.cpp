#include "quantize/request.hpp"

#include <limits>
#include <string>

#include "error.hpp"

namespace pyint8 {
namespace {

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorCode::kInvalidArgument, why);
}

std::size_t product(std::size_t left, std::size_t right) {
  std::size_t result = 0;
  if (__builtin_mul_overflow(left, right, &result)) refuse("a tensor that is too large");
  return result;
}

std::size_t bytes_of_row(const Request& request) {
  return stays_as_stored(request) ? request.columns : product(request.columns, size_of(request.stored));
}

// How many bytes the rows are.
std::size_t check_sizes(const Request& request) {
  const std::size_t nbytes = product(request.rows, bytes_of_row(request));
  if (nbytes == 0) refuse("an empty tensor");
  const auto* range = std::get_if<Range>(&request.from);
  if (range != nullptr && range->nbytes != nbytes) {
    refuse("a range of " + std::to_string(range->nbytes) + " bytes for a tensor of " +
           std::to_string(nbytes));
  }
  return nbytes;
}

void check_int8(const ToInt8& to, const Request& request, const Room& room) {
  validate(CastJob{0, request.stored, to.through_bfloat16, 0, 0, ElementType::kHalf});
  constexpr std::size_t kMost = std::numeric_limits<int>::max();
  if (request.rows > kMost || request.columns > kMost) {
    refuse("a weight of " + std::to_string(request.rows) + " x " + std::to_string(request.columns) +
           " has more rows or columns than bitsandbytes counts");
  }
  const std::size_t half_bytes = request.rows * request.columns * size_of(ElementType::kHalf);
  if (to.transposed && half_bytes > room.transposed) {
    refuse("a transposed weight of " + std::to_string(half_bytes) + " bytes does not fit in its memory of " +
           std::to_string(room.transposed));
  }
}

void check_values(const ToValues& to, const Request& request) {
  if (request.marks != 0 && to.dtype != ElementType::kHalf) refuse("only a cast to fp16 has marks");
  if (to.dtype) validate(CastJob{0, request.stored, false, 0, to.values, *to.dtype});
}

std::vector<Band> cut(const Request& request, std::size_t nbytes, const Room& room) {
  if (stays_as_stored(request)) {
    if (room.all_pass && std::holds_alternative<Range>(request.from)) {
      return cut_into_bands(nbytes, 1, room.band);
    }
    return {{0, request.rows, 0, nbytes}};  // straight to its place
  }
  const std::size_t row = bytes_of_row(request);
  if (row > room.band) {
    refuse("a row of " + std::to_string(row) + " bytes does not fit in a band of " +
           std::to_string(room.band));
  }
  return cut_into_bands(request.rows, row, room.band);
}

}  // namespace

bool stays_as_stored(const Request& request) {
  const auto* to = std::get_if<ToValues>(&request.to);
  return to != nullptr && !to->dtype;
}

bool is_transposed(const Request& request) {
  const auto* to = std::get_if<ToInt8>(&request.to);
  return to != nullptr && to->transposed;
}

std::vector<Band> bands_of(const Request& request, const Room& room) {
  const std::size_t nbytes = check_sizes(request);
  if (const auto* to = std::get_if<ToInt8>(&request.to)) {
    check_int8(*to, request, room);
  } else {
    check_values(std::get<ToValues>(request.to), request);
  }
  return cut(request, nbytes, room);
}

}  // namespace pyint8
