#include "quantize/share.hpp"

#include <string>

#include "error.hpp"

namespace pyint8 {
namespace {

constexpr std::size_t kAlignment = 16;  // of ranks' parts: what NCCL loads at once

}  // namespace

std::size_t Share::part_of(std::size_t nbytes) const {
  return ranks == 1 || nbytes < least_bytes ? 0 : nbytes / (ranks * kAlignment) * kAlignment;
}

std::vector<Share::Span> Share::spans_of(std::size_t nbytes) const {
  const std::size_t part = part_of(nbytes);
  std::vector<Span> spans;
  for (const Span span : {Span{rank * part, (rank + 1) * part, true}, Span{ranks * part, nbytes, false}}) {
    if (span.begin < span.end) spans.push_back(span);
  }
  return spans;
}

void validate(const Share& share) {
  if (share.rank < share.ranks) return;
  throw Error(ErrorCode::kInvalidArgument,
              "there is no rank " + std::to_string(share.rank) + " among " + std::to_string(share.ranks));
}

}  // namespace pyint8
