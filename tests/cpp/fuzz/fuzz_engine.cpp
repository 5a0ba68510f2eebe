// An engine with whatever options, files, lanes and reads, while storage and driver fail: what has arrived is
// a plain copy of the file's bytes, what has not has a reason, and nothing beside a destination is written.
#include <unistd.h>

#include <deque>
#include <optional>
#include <set>

#include "device/device_host.hpp"
#include "engine_support.hpp"
#include "judge.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kGuard = 16;
constexpr std::byte kUntouched{0x5a};
constexpr std::uint32_t kGpus = 2;

// Memory that a read goes to, with more about it.
class Place {
 public:
  explicit Place(const Range& range) : range_(range), memory_(room() + 2 * kGuard, kUntouched) {}
  Read read() { return {range_, reinterpret_cast<Address>(memory_.data() + kGuard)}; }
  const Range& range() const { return range_; }
  bool has(const Bytes& content) const {
    return std::equal(memory_.begin() + kGuard, memory_.end() - kGuard,
                      content.begin() + static_cast<std::ptrdiff_t>(range_.nbytes == 0 ? 0 : range_.offset));
  }
  bool is_whole_about() const {
    const auto is_free = [](std::byte byte) { return byte == kUntouched; };
    return std::all_of(memory_.begin(), memory_.begin() + kGuard, is_free) &&
           std::all_of(memory_.end() - kGuard, memory_.end(), is_free);
  }

 private:
  // A range that nobody could read is refused before anything is written.
  std::size_t room() const { return range_.nbytes > (1u << 20) ? 0 : range_.nbytes; }

  Range range_;
  Bytes memory_;
};

struct Ordered {
  Place* place;
  Ticket ticket;
  std::uint32_t lane;
};

EngineOptions options_from(Input& input) {
  return {.threads = input.pick(1, 3),
          .slots_per_thread = input.pick(1, 3),
          .slot_bytes = kDirectAlignment * input.pick(2, 4),
          .direct_io = input.once_in(2),
          .timeline = input.once_in(3)};
}

std::vector<std::size_t> sizes_from(Input& input) {
  std::vector<std::size_t> sizes(input.pick(1, 3));
  for (std::size_t& size : sizes) size = input.pick(0, 10 * kDirectAlignment);
  return sizes;
}

class Run {
 public:
  explicit Run(Input& input) : input_(input), checkpoint_(sizes_from(input)), options_(options_from(input)) {}

  void operator()() {
    std::deque<Caller> callers;
    for (std::uint32_t gpu = 0; gpu < kGpus; ++gpu) callers.emplace_back(static_cast<int>(gpu));
    Trouble trouble(input_);
    trouble_ = &trouble;
    trouble.passes([&] {
      Engine engine(options_);
      checkpoint_.open(engine);
      for (std::uint32_t gpu = 0; gpu < kGpus; ++gpu) {
        engine.add_device(std::make_unique<CudaDevice>(fake_driver(), static_cast<int>(gpu)));
      }
      engine.add_device(std::make_unique<HostDevice>(1));
      use(engine, callers);
      trouble.passes([&] { engine.close(); });
    });
    fake_cuda_fail_after("cuStreamSynchronize", 0, 0);  // if it has not come yet, let it not be the callers'
    for (Caller& caller : callers) caller.synchronize();
    for (const Ordered& each : arrived_) {
      const std::uint32_t file = each.place->range().file;
      // A read that a cut overtakes may bring the zeros behind the new end: that the file changed is told.
      require(cut_.contains(file) || each.place->has(checkpoint_.contents[file]), "the bytes are the file's");
    }
    for (const Place& place : places_) require(place.is_whole_about(), "nothing beside a place is written");
  }

 private:
  void use(Engine& engine, std::deque<Caller>& callers) {
    while (!input_.empty()) {
      if (input_.once_in(3)) {
        wait(engine, callers);
      } else {
        submit(engine, callers);
      }
      if (input_.once_in(20)) cut();
    }
    while (!ordered_.empty()) wait(engine, callers);
    const auto code = error_code([&] { engine.require_unchanged(); });
    require(code == (cut_.empty() ? std::nullopt : std::optional(ErrorCode::kChanged)), "a change is told");
  }

  StreamHandle stream_of(std::uint32_t lane, std::deque<Caller>& callers) {
    return lane < kGpus ? callers[lane].stream() : 0;
  }

  Range range_from() {
    const auto file = static_cast<std::uint32_t>(input_.pick(0, checkpoint_.contents.size() - 1));
    const std::size_t size = checkpoint_.contents[file].size();
    if (input_.once_in(60)) return {file + 9, 0, 1};  // of no file
    if (input_.once_in(60)) return {file, input_.number<std::uint64_t>() | 1ull << 63, 1};
    if (input_.once_in(30)) return {file, input_.pick(0, size), size + 1};  // beyond the end
    const std::size_t offset = input_.pick(0, size);
    return {file, offset, input_.pick(0, std::min(size - offset, input_.pick(0, 3) * std::size_t{5000}))};
  }

  bool can_be(const Range& range) const {
    return range.file < checkpoint_.contents.size() && range.offset < 1ull << 63;
  }

  void submit(Engine& engine, std::deque<Caller>& callers) {
    std::vector<Read> reads;
    std::vector<Place*> places;
    bool can_all_be = true;
    for (std::size_t count = input_.pick(0, 5); count > 0; --count) {
      const Range range = range_from();
      can_all_be = can_all_be && can_be(range);
      places.push_back(&places_.emplace_back(range));
      reads.push_back(places.back()->read());
    }
    const auto lane = static_cast<std::uint32_t>(input_.once_in(80) ? 7 : input_.pick(0, kGpus));
    if (lane > kGpus || !can_all_be) return refuse(engine, lane, reads, callers);
    if (std::ranges::any_of(places, [this](const Place* place) { return is_beyond(place->range()); })) {
      trouble_->allow(ErrorCode::kTruncated);
    }
    trouble_->passes([&] {
      Ticket ticket = engine.submit(lane, reads, stream_of(lane, callers), input_.once_in(4));
      for (Place* place : places) ordered_.push_back({place, ticket++, lane});
    });
  }

  bool is_beyond(const Range& range) const {
    return range.offset + range.nbytes > checkpoint_.contents[range.file].size();
  }

  void refuse(Engine& engine, std::uint32_t lane, std::span<const Read> reads, std::deque<Caller>& callers) {
    const auto code = error_code([&] { engine.submit(lane, reads, stream_of(lane, callers), false); });
    require(code == ErrorCode::kInvalidArgument || code == ErrorCode::kDriver, "what cannot be is refused");
  }

  void wait(Engine& engine, std::deque<Caller>& callers) {
    if (ordered_.empty()) return;
    const auto at = ordered_.begin() + static_cast<std::ptrdiff_t>(input_.pick(0, ordered_.size() - 1));
    const Ordered each = *at;
    ordered_.erase(at);
    const bool came = trouble_->passes(
        [&] { require(engine.wait(each.ticket, stream_of(each.lane, callers), kPatience), "it comes"); });
    if (came && !is_beyond(each.place->range())) arrived_.push_back(each);
    require(!came || !is_beyond(each.place->range()), "what is not in the file does not arrive");
  }

  void cut() {
    const auto file = static_cast<std::uint32_t>(input_.pick(0, checkpoint_.contents.size() - 1));
    const std::size_t size = checkpoint_.contents[file].size();
    if (size == 0) return;
    const auto left = static_cast<off_t>(input_.pick(0, size - 1));
    require(::truncate(checkpoint_.files[file].path().c_str(), left) == 0, "the test can cut its file");
    cut_.insert(file);
    trouble_->allow(ErrorCode::kChanged);
    trouble_->allow(ErrorCode::kTruncated);
  }

  Input& input_;
  const Checkpoint checkpoint_;
  const EngineOptions options_;
  Trouble* trouble_ = nullptr;
  std::deque<Place> places_;
  std::deque<Ordered> ordered_;
  std::vector<Ordered> arrived_;
  std::set<std::uint32_t> cut_;
};

}  // namespace

void fuzz(Input& input) {
  leaving_nothing<Run>(input);
}

}  // namespace pyint8::testing
