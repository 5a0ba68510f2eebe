#include "transfer/engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <optional>

#include "error.hpp"

namespace pyint8 {
namespace {

// Unwanted bytes read through to serve two tensors with one read: fewer than a request costs on any storage.
constexpr std::size_t kMaxGap = std::size_t{64} << 10;

// With as many twins for direct reads, within the 256 that some systems allow a process. More workers than
// that may read at once.
constexpr std::size_t kMostOpenFiles = 64;
// A shorter wait is not worth a line in a picture.
constexpr double kNoticeable = 10e-6;

std::uint64_t nanoseconds(double seconds) {
  return static_cast<std::uint64_t>(seconds * 1e9);
}

EngineOptions validated(const EngineOptions& options) {
  validate(options);
  return options;
}

PlanLimits limits_for(const Device& device, const EngineOptions& options) {
  if (device.reads_in_place())
    return {.piece_bytes = options.slot_bytes};  // straight into place: nothing between
  return {.piece_bytes = options.slot_bytes,
          .alignment = options.direct_io ? kDirectAlignment : 1,
          .max_gap = kMaxGap};
}

Error cancelled() {
  return Error(ErrorCode::kCancelled, "the stream was closed");
}

}  // namespace

Engine::Engine(const EngineOptions& options)
    : options_(validated(options)),
      timeline_(options_.timeline ? std::make_unique<Timeline>() : nullptr),
      process_(::getpid()),
      open_files_(descriptors_to_take(kMostOpenFiles)),
      workers_(options_.threads, {.get_ready = [this](std::size_t worker) { await_slot(worker); },
                                  .run = [this](const Job& job, std::size_t worker) { run(job, worker); },
                                  .on_failure =
                                      [this] {
                                        // The lock orders this with a waiter between its check and its sleep.
                                        const std::lock_guard lock(mutex_);
                                        progress_.notify_all();
                                      }}) {}

Engine::~Engine() {
  try {
    close();
  } catch (...) {  // the driver has failed: its copies are over
  }
}

bool Engine::is_of_this_process() const {
  return ::getpid() == process_;
}

std::uint32_t Engine::add_file(const std::string& path, const std::optional<FileStamp>& expected) {
  require_own_process();
  return add_source(open_files_.open(path, options_.direct_io, expected));
}

std::uint32_t Engine::add_source(std::shared_ptr<const Source> source) {
  require_own_process();
  const std::lock_guard lock(mutex_);
  files_.push_back(std::move(source));
  return static_cast<std::uint32_t>(files_.size() - 1);
}

std::uint32_t Engine::add_checksum(std::string path, const Range& whole, std::uint32_t expected) {
  require_own_process();
  const std::lock_guard lock(mutex_);
  checksums_.emplace_back(std::move(path), whole.offset, whole.nbytes, expected);
  return static_cast<std::uint32_t>(checksums_.size() - 1);
}

std::uint32_t Engine::add_shared_checksum(const Range& whole) {
  require_own_process();
  const std::lock_guard lock(mutex_);
  const auto number = static_cast<std::uint32_t>(checksums_.size());
  for (int i = 0; i < 2; ++i) checksums_.emplace_back("", whole.offset, whole.nbytes, std::nullopt);
  return number;
}

Checksum::Sum Engine::sum_of(std::uint32_t checksum) const {
  const std::lock_guard lock(mutex_);
  if (checksum < checksums_.size()) return checksums_[checksum].sum();
  throw Error(ErrorCode::kInvalidArgument, "there is no checksum " + std::to_string(checksum));
}

std::uint32_t Engine::add_device(std::unique_ptr<Device> device) {
  require_own_process();
  Device& added = *device;
  std::unique_lock lock(mutex_);
  spare_events_.resize(devices_.size() + 1);  // these first, so that no device is without
  while (detours_.size() < devices_.size() + 1) detours_.emplace_back();
  devices_.push_back(std::move(device));
  const auto lane = static_cast<std::uint32_t>(devices_.size() - 1);
  lock.unlock();
  if (timeline_ != nullptr) timeline_->add_device(lane, added);
  return lane;
}

Device& Engine::device(std::uint32_t lane) {
  require_own_process();
  const std::lock_guard lock(mutex_);
  if (lane < devices_.size()) return *devices_[lane];
  throw Error(ErrorCode::kInvalidArgument, "there is no lane " + std::to_string(lane));
}

void Engine::make_rings(Device& device) {
  if (has_rings_) return;
  auto slots = device.allocate_host(workers_.size() * options_.ring_bytes());
  std::deque<Ring> rings;
  for (std::size_t worker = 0; worker < workers_.size(); ++worker) {
    rings.emplace_back(slots->data() + worker * options_.ring_bytes(), options_.slot_bytes,
                       options_.slots_per_thread, timeline_ != nullptr);
  }
  slots_ = std::move(slots);
  rings_.swap(rings);
  has_rings_ = true;
}

void Engine::prepare(std::uint32_t lane) {
  Device& to = device(lane);
  const std::lock_guard lock(mutex_);
  if (closed_) throw cancelled();
  if (!to.reads_in_place()) make_rings(to);
}

std::vector<Engine::Refused> Engine::add_detours(std::uint32_t lane,
                                                 std::vector<std::unique_ptr<Detour>> detours) {
  if (device(lane).reads_in_place()) {
    throw Error(ErrorCode::kInvalidArgument,
                "lane " + std::to_string(lane) + " has no bus that a detour could lead around");
  }
  if (detours.empty() || detours.size() >= kMostRoads) {
    throw Error(ErrorCode::kInvalidArgument, std::to_string(detours.size()) + " detours; there may be 1 to " +
                                                 std::to_string(kMostRoads - 1));
  }
  prepare(lane);
  const std::lock_guard ending(ending_);  // until these are in place, or gone again, slots stay
  Detours& of_lane = closed_detours(lane);
  std::vector<Refused> refused = stage(detours);
  if (refused.size() == detours.size()) return refused;
  const std::lock_guard lock(mutex_);
  if (closed_) throw cancelled();
  of_lane.all = std::move(detours);
  of_lane.are_open = true;
  return refused;
}

// Worker `w` takes road `w * roads / workers`: those of one road have slots one behind the other.
std::vector<Engine::Refused> Engine::stage(std::vector<std::unique_ptr<Detour>>& detours) {
  const std::size_t workers = workers_.size(), roads = detours.size() + 1;
  const auto first_slot = [&](std::size_t number) {
    return (number * workers + roads - 1) / roads * options_.ring_bytes();
  };
  std::vector<Refused> refused;
  for (std::size_t i = 0; i < detours.size(); ++i) {
    const std::size_t begin = first_slot(i + 1), end = first_slot(i + 2);
    try {
      if (begin < end) detours[i]->stage(slots_->data() + begin, end - begin);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kDriver) throw;
      refused.push_back({i, error.message()});
      detours[i].reset();
    }
  }
  return refused;
}

// A lane's, which has none yet.
Engine::Detours& Engine::closed_detours(std::uint32_t lane) {
  const std::lock_guard lock(mutex_);
  if (closed_) throw cancelled();
  if (detours_[lane].are_open) throw Error(ErrorCode::kInvalidArgument, "the lane has detours already");
  return detours_[lane];
}

Engine::Way Engine::way_for(const Job& job, std::size_t worker) const {
  const Way own{job.device, 0};
  if (!job.detours->are_open) return own;
  const auto& detours = job.detours->all;
  const std::size_t number = worker * (detours.size() + 1) / workers_.size();
  Detour* const detour = number == 0 ? nullptr : detours[number - 1].get();
  if (detour == nullptr) return own;
  const bool leads = std::ranges::all_of(job.to, [&](Address to) { return detour->reaches(to); });
  return leads ? Way{detour, number} : own;
}

Road& Engine::road(Device& own, const Detours& detours, std::size_t number) {
  if (number == 0) return own;
  return *detours.all[number - 1];
}

std::unique_ptr<Event> Engine::take_event(std::uint32_t lane, std::size_t number) {
  auto& spare = spare_events_[lane][number];
  if (spare.empty()) return road(*devices_[lane], detours_[lane], number).make_event();
  auto event = std::move(spare.back());
  spare.pop_back();
  return event;
}

Ticket Engine::submit(std::uint32_t lane, std::span<const Read> reads, StreamHandle stream, bool first) {
  Device& to = device(lane);
  const auto start = std::make_shared<Start>();
  start->ready = to.make_event();
  to.record_on(stream, *start->ready);

  std::unique_lock lock(mutex_);
  if (closed_) throw cancelled();
  if (!to.reads_in_place()) make_rings(to);  // fails here, not on a worker, where memory cannot be pinned
  const Ticket ticket = pending_.size();
  std::vector<Job> jobs = make_jobs(lane, reads, start);
  lock.unlock();
  workers_.push(lane, std::move(jobs), first);
  return ticket;
}

std::vector<Engine::Job> Engine::make_jobs(std::uint32_t lane, std::span<const Read> reads,
                                           const std::shared_ptr<Start>& start) {
  std::vector<Range> ranges;
  ranges.reserve(reads.size());
  for (const Read& read : reads) {
    if (read.range.file >= files_.size()) {
      throw Error(ErrorCode::kInvalidArgument, "there is no file " + std::to_string(read.range.file));
    }
    ranges.push_back(read.range);
  }
  std::vector<Piece> pieces = make_plan(ranges, limits_for(*devices_[lane], options_));

  const std::size_t base = pending_.size();
  for (std::size_t i = 0; i < reads.size(); ++i) pending_.emplace_back(lane, take_event(lane));
  std::vector<Job> jobs;
  jobs.reserve(pieces.size());
  for (Piece& piece : pieces) {
    Job job{
        lane, devices_[lane].get(), &detours_[lane], files_[piece.file].get(), std::move(piece), {}, {}, {},
        start};
    for (const Segment& segment : job.piece.segments) {
      Pending& pending = pending_[base + segment.range];
      ++pending.pieces_left;
      job.to.push_back(reads[segment.range].to + segment.range_offset);
      job.tickets.push_back(&pending);  // a deque never moves its elements
      const std::uint32_t checksum = reads[segment.range].range.checksum;
      job.checksums.push_back(checksum == kUnchecked ? nullptr : &checksums_.at(checksum));
    }
    jobs.push_back(std::move(job));
  }
  for (std::size_t i = base; i < pending_.size(); ++i) pending_[i].on_its_way = pending_[i].pieces_left == 0;
  return jobs;
}

void Engine::await_slot(std::size_t worker) {
  if (!has_rings_) return;
  const double begin = Timeline::now();
  const std::optional<std::size_t> emptied = rings_[worker].wait_for_empty();
  const double end = Timeline::now();
  slot_nanoseconds_.fetch_add(nanoseconds(end - begin), std::memory_order_relaxed);
  if (timeline_ != nullptr && end - begin > kNoticeable) {
    timeline_->add({Doing::kWaiting, static_cast<std::uint32_t>(worker), begin, end, 0});
  }
  if (!emptied) return;
  if (timeline_ != nullptr) note_copy(rings_[worker].emptied());
  workers_.done(*emptied);
}

void Engine::run(const Job& job, std::size_t worker) {
  std::size_t road = 0;
  if (job.device->reads_in_place()) {
    if (!read_in_place(job, worker)) return;
  } else {
    road = read_through_slot(job, worker);
  }
  pieces_.fetch_add(1, std::memory_order_relaxed);
  complete(job, road);
}

bool Engine::read_in_place(const Job& job, std::size_t worker) {
  for (std::size_t i = 0; i < job.to.size(); ++i) {
    if (workers_.is_stopped()) return false;
    const Segment& segment = job.piece.segments[i];
    timed_read(*job.source, reinterpret_cast<std::byte*>(job.to[i]), segment.nbytes, segment.nbytes,
               job.piece.offset + segment.piece_offset, worker);
    check(job, i, reinterpret_cast<const std::byte*>(job.to[i]));
  }
  workers_.done(job.lane);
  return true;
}

// The number of the road that it took.
std::size_t Engine::read_through_slot(const Job& job, std::size_t worker) {
  Ring::Slot& slot = rings_[worker].lease();
  timed_read(*job.source, slot.data(), job.piece.needed, job.piece.capacity, job.piece.offset, worker);
  for (std::size_t i = 0; i < job.to.size(); ++i) {
    check(job, i, slot.data() + job.piece.segments[i].piece_offset);
  }
  const Way way = way_for(job, worker);
  await(*job.start, way);
  copy_out(job, slot, way);
  rings_[worker].give_back(slot);
  return way.number;
}

void Engine::check(const Job& job, std::size_t segment, const std::byte* bytes) {
  if (job.checksums[segment] == nullptr) return;
  const Segment& part = job.piece.segments[segment];
  job.checksums[segment]->add(job.piece.offset + part.piece_offset, {bytes, part.nbytes});
}

// A detour's copies are in no picture: they share the bus of another device.
void Engine::copy_out(const Job& job, Ring::Slot& slot, const Way& way) {
  const double issued = timeline_ == nullptr ? 0 : Timeline::now();
  for (std::size_t i = 0; i < job.to.size(); ++i) {
    const Segment& segment = job.piece.segments[i];
    way.road->copy(job.to[i], slot.data() + segment.piece_offset, segment.nbytes);
    if (way.number > 0) bytes_detoured_.fetch_add(segment.nbytes, std::memory_order_relaxed);
  }
  slot.mark(*way.road, job.lane, way.number, issued, job.piece.needed);
}

void Engine::await(Start& start, const Way& way) {
  const std::lock_guard lock(start.mutex);
  const std::uint32_t bit = 1U << way.number;
  if ((start.awaited & bit) != 0) return;
  way.road->copies_wait_for(*start.ready);
  start.awaited |= bit;
}

void Engine::timed_read(const Source& source, std::byte* out, std::size_t needed, std::size_t capacity,
                        std::uint64_t offset, std::size_t worker) {
  const double begin = Timeline::now();
  source.read_at(out, needed, capacity, offset);
  const double end = Timeline::now();
  read_nanoseconds_.fetch_add(nanoseconds(end - begin), std::memory_order_relaxed);
  bytes_read_.fetch_add(needed, std::memory_order_relaxed);
  if (timeline_ != nullptr) {
    timeline_->add({Doing::kReading, static_cast<std::uint32_t>(worker), begin, end, needed});
  }
}

void Engine::complete(const Job& job, std::size_t road) {
  std::vector<Pending*> finished;
  for (std::size_t i = 0; i < job.tickets.size(); ++i) {
    bytes_delivered_.fetch_add(job.piece.segments[i].nbytes, std::memory_order_relaxed);
    job.tickets[i]->roads |= 1U << road;  // before the count, which whoever is last sees
    if (--job.tickets[i]->pieces_left == 0) finished.push_back(job.tickets[i]);
  }
  if (finished.empty()) return;
  for (Pending* pending : finished) record_landed(job, *pending);
  {
    const std::lock_guard lock(mutex_);
    for (Pending* pending : finished) pending->on_its_way = true;
  }
  progress_.notify_all();
}

// The worker that issues a ticket's last copy records its events, one on each road that was taken: all the
// other copies are there already.
void Engine::record_landed(const Job& job, Pending& pending) {
  for (std::size_t number = 0; number < kMostRoads; ++number) {
    if ((pending.roads & 1U << number) == 0) continue;
    if (number > 0) {
      const std::lock_guard lock(mutex_);
      pending.landed[number] = take_event(job.lane, number);
    }
    road(*job.device, *job.detours, number).record(*pending.landed[number]);
  }
}

Engine::Pending* Engine::await_issue(Ticket ticket, std::chrono::milliseconds timeout,
                                     std::unique_lock<std::mutex>& lock) {
  if (ticket >= pending_.size()) {
    throw Error(ErrorCode::kInvalidArgument, "there is no ticket " + std::to_string(ticket));
  }
  Pending& pending = pending_[ticket];
  std::exception_ptr error;
  const bool over = progress_.wait_for(
      lock, timeout, [&] { return pending.on_its_way || closed_ || (error = workers_.error()) != nullptr; });
  if (!over) return nullptr;
  if (error != nullptr) std::rethrow_exception(error);
  if (closed_) throw cancelled();
  return &pending;
}

bool Engine::wait(Ticket ticket, StreamHandle stream, std::chrono::milliseconds timeout) {
  require_own_process();
  std::unique_lock lock(mutex_);
  Pending* pending = await_issue(ticket, timeout, lock);
  if (pending == nullptr) return false;
  if (pending->landed[0] == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, "ticket " + std::to_string(ticket) + " was waited for before");
  }
  for (std::size_t number = 0; number < kMostRoads; ++number) {
    if (pending->landed[number] == nullptr) continue;
    devices_[pending->lane]->stream_waits_for(stream, *pending->landed[number]);
    spare_events_[pending->lane][number].push_back(std::move(pending->landed[number]));
  }
  return true;
}

bool Engine::is_on_its_way(Ticket ticket, std::chrono::milliseconds timeout) {
  require_own_process();
  std::unique_lock lock(mutex_);
  return await_issue(ticket, timeout, lock) != nullptr;
}

bool Engine::wait_all(std::span<const Ticket> tickets, StreamHandle stream,
                      std::chrono::milliseconds timeout) {
  const auto until = std::chrono::steady_clock::now() + timeout;
  for (const Ticket ticket : tickets) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
    if (!is_on_its_way(ticket, std::max(left, std::chrono::milliseconds(0)))) return false;
  }
  for (const Ticket ticket : tickets) wait(ticket, stream, timeout);
  return true;
}

Ticket Engine::promise(std::uint32_t lane, std::size_t count) {
  device(lane);  // throws where there is none
  const std::lock_guard lock(mutex_);
  if (closed_) throw cancelled();
  const Ticket first = pending_.size();
  for (std::size_t i = 0; i < count; ++i) pending_.emplace_back(lane, take_event(lane));
  return first;
}

void Engine::keep_promise(Ticket first, std::size_t count, StreamHandle stream) {
  require_own_process();
  {
    const std::lock_guard lock(mutex_);
    if (closed_) throw cancelled();
    if (first + count > pending_.size()) {
      throw Error(ErrorCode::kInvalidArgument, "there is no ticket " + std::to_string(first + count - 1));
    }
    for (Ticket ticket = first; ticket < first + count; ++ticket) {
      Pending& pending = pending_[ticket];
      if (pending.on_its_way || pending.pieces_left != 0) {
        throw Error(ErrorCode::kInvalidArgument, "ticket " + std::to_string(ticket) + " is not a promise");
      }
      devices_[pending.lane]->record_on(stream, *pending.landed[0]);
      pending.on_its_way = true;
    }
  }
  progress_.notify_all();
}

void Engine::transpose_to_half(std::uint32_t lane, const TransposeJob& job, StreamHandle stream) {
  device(lane).transpose_to_half(job, stream);
}

void Engine::require_unchanged() const {
  require_own_process();
  const std::lock_guard lock(mutex_);
  for (const auto& file : files_) file->require_unchanged();
}

// After a fork the child has the engine, but neither its threads nor what they guarded with their locks.
void Engine::require_own_process() const {
  if (is_of_this_process()) return;
  throw Error(ErrorCode::kCancelled,
              "the stream belongs to the process that forked this one; load again here");
}

// Without the lock: whoever waits for a ticket meanwhile must be told that it will not come. The first error,
// of one device: the others must be waited for in any case.
std::exception_ptr Engine::await_copies() {
  std::unique_lock lock(mutex_);
  const std::size_t count = devices_.size();
  lock.unlock();
  std::exception_ptr error;
  const auto await = [&](Road& road) {
    // Twice: where asking itself failed, copies may still read the slots that go next.
    for (int attempt = 0; attempt < 2; ++attempt) {
      try {
        return road.synchronize();
      } catch (const Error&) {
        if (error == nullptr) error = std::current_exception();
      }
    }
  };
  for (std::uint32_t lane = 0; lane < count; ++lane) {
    lock.lock();
    Device& to = *devices_[lane];
    const Detours& detours = detours_[lane];
    lock.unlock();
    await(to);
    for (const auto& detour : detours.all) {
      if (detour != nullptr) await(*detour);
    }
  }
  return error;
}

void Engine::note_copy(const Ring::Copied& copied) {
  if (copied.road > 0) return;
  timeline_->add_copy(static_cast<std::uint32_t>(copied.lane), *copied.end, copied.issued, copied.nbytes);
}

void Engine::settle_timeline() {
  for (const Ring& ring : rings_) {
    for (const Ring::Copied& copied : ring.under_way()) note_copy(copied);
  }
  timeline_->settle();
}

void Engine::close() {
  if (!is_of_this_process()) return;
  std::vector<std::shared_ptr<const Source>> sources;  // let go of without the lock
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    sources.swap(files_);
  }
  progress_.notify_all();
  for (const auto& source : sources) source->cancel();
  workers_.stop();
  const std::lock_guard ending(ending_);  // another thread may be closing too: then nothing is left
  std::exception_ptr error = await_copies();
  try {
    // Not after an error: it is what shall be told.
    if (timeline_ != nullptr && error == nullptr && workers_.error() == nullptr) settle_timeline();
  } catch (...) {
    error = std::current_exception();
  }
  give_back();
  if (error != nullptr) std::rethrow_exception(error);
}

// The driver may let whoever gives memory back wait for what runs on that GPU: so not with the lock held.
void Engine::give_back() {
  rings_.clear();  // of the workers, who have left
  slots_.reset();
  std::unique_lock lock(mutex_);
  const std::size_t lanes = detours_.size();
  for (auto& of_lane : spare_events_) of_lane = {};
  for (Pending& pending : pending_) pending.landed = {};
  lock.unlock();
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    std::vector<std::unique_ptr<Detour>> detours;
    const std::lock_guard taking(mutex_);
    detours.swap(detours_[lane].all);
  }
}

Stats Engine::stats() const {
  return {bytes_read_,
          bytes_delivered_,
          bytes_detoured_,
          pieces_,
          static_cast<double>(read_nanoseconds_) * 1e-9,
          static_cast<double>(slot_nanoseconds_) * 1e-9};
}

}  // namespace pyint8
