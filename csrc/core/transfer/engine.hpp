// Reads in, tensors out: the engine takes ranges of files and addresses, and says when each has arrived.
//
// The way of a byte: page cache -> (pread, by a worker) -> pinned slot -> (copy stream) -> device memory. For
// host memory the middle is left out. No thread waits for a device as a whole; slots, tickets and
// destinations each have an event of their own.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/device.hpp"
#include "options.hpp"
#include "storage/open_files.hpp"
#include "transfer/checksum.hpp"
#include "transfer/plan.hpp"
#include "transfer/ring.hpp"
#include "transfer/timeline.hpp"
#include "transfer/workers.hpp"

namespace pyint8 {

// A range of a file and where in a device's memory its first byte goes.
struct Read {
  Range range;
  Address to;
};

// One read's number; they count up from 0 in the order of submission.
using Ticket = std::uint64_t;

struct Stats {
  std::uint64_t bytes_read;       // from files, gaps and alignment included
  std::uint64_t bytes_delivered;  // to destinations
  std::uint64_t bytes_detoured;   // of those, over other devices' buses
  std::uint64_t pieces;
  double read_seconds;  // sum over workers: in pread
  double slot_seconds;  // sum over workers: waiting for the bus to empty a slot
};

class Engine {
 public:
  explicit Engine(const EngineOptions& options);
  // Closes.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Returns the file's number, for `Range::file`. Throws kChanged if it is in another state than `expected`.
  std::uint32_t add_file(const std::string& path, const std::optional<FileStamp>& expected = std::nullopt);
  // Of what is no file. Shared, as the last to let go of it may have to wait for a lock of its own.
  std::uint32_t add_source(std::shared_ptr<const Source> source);
  // Returns a number for `Range::checksum`: the bytes of `whole`, of a file that errors call `path`, shall
  // have the CRC-32C `expected`. The ranges that name it are parts of `whole`, and have each byte once; the
  // last to arrive does not, and stops the engine with kDamaged, if the bytes are others.
  std::uint32_t add_checksum(std::string path, const Range& whole, std::uint32_t expected);
  // The same for ranks that share out what they read, and compare nothing but their sums, once all is read.
  // The number is for bytes that every rank reads; `checksum_of_parts` has the other.
  std::uint32_t add_shared_checksum(const Range& whole);
  Checksum::Sum sum_of(std::uint32_t checksum) const;
  // Returns the lane's number.
  std::uint32_t add_device(std::unique_ptr<Device> device);

  Device& device(std::uint32_t lane);

  // Pins the ring, which the first submission to a device other than the host would do.
  void prepare(std::uint32_t lane);

  struct Refused {
    std::size_t number;  // among the detours that were given, from 0 on
    std::string reason;
  };
  // Lets an equal share of the workers take each of these ways to a lane's memory, where it leads to, from
  // now on; once a lane. Slots are pinned, if they are not yet. Where the driver refuses one its memory, its
  // workers take the device's own bus. Throws kInvalidArgument for more than `kMostRoads` in all, and for a
  // lane whose workers read straight into place; then there are none.
  std::vector<Refused> add_detours(std::uint32_t lane, std::vector<std::unique_ptr<Detour>> detours);

  // Submits `reads` into memory of lane `lane`, in that order; returns the first one's ticket. Destinations
  // are written only after what the caller has put on `stream` so far. `first`: ahead of the lane's others.
  Ticket submit(std::uint32_t lane, std::span<const Read> reads, StreamHandle stream, bool first);

  // Waits up to `timeout` until `ticket` is on its way, then makes `stream` wait for its arrival; false if
  // the time ran out. Throws what stopped the engine: the first worker's error, or kCancelled. A ticket is
  // waited for once.
  bool wait(Ticket ticket, StreamHandle stream, std::chrono::milliseconds timeout);

  // Waits up to `timeout` until `ticket` is on its way, without ordering anything after it; false if the time
  // ran out. Throws as `wait`.
  bool is_on_its_way(Ticket ticket, std::chrono::milliseconds timeout);

  // `wait` for several: false, with nothing ordered, if the time ran out before all were on their way.
  bool wait_all(std::span<const Ticket> tickets, StreamHandle stream, std::chrono::milliseconds timeout);

  // Tickets for bytes of memory of lane `lane` that someone else brings there (other ranks' parts of a
  // tensor); returns the first of `count`. They are waited for like all others.
  Ticket promise(std::uint32_t lane, std::size_t count);
  // The bytes of `count` promised tickets from `first` on are there once all that is on `stream` so far is
  // done.
  void keep_promise(Ticket first, std::size_t count, StreamHandle stream);

  // Transposes a weight on a lane (see transpose.hpp), on `stream`.
  void transpose_to_half(std::uint32_t lane, const TransposeJob& job, StreamHandle stream);

  // Throws kChanged if one of the files is in another state than when it was opened.
  void require_unchanged() const;

  // Discards what has not begun, cancels reads under way, joins the workers and waits until no copy is under
  // way, so that slots and destinations may be given back. Idempotent; waits for tickets throw kCancelled
  // from then on.
  void close();

  Stats stats() const;
  // What was done when; null unless it is asked for.
  Timeline* timeline() { return timeline_.get(); }

  // False in a child that was forked since: there all calls throw kCancelled, `close` does nothing, and the
  // engine must be leaked, as its threads cannot be joined.
  bool is_of_this_process() const;
  // Throws kCancelled there.
  void require_own_process() const;

 private:
  struct Pending {  // one ticket
    Pending(std::uint32_t on, std::unique_ptr<Event> event) : lane(on) { landed[0] = std::move(event); }
    std::uint32_t lane;
    std::atomic<std::size_t> pieces_left{0};
    std::atomic<std::uint32_t> roads{0};  // that pieces took, a bit each
    bool on_its_way = false;              // all its copies are issued and `landed` is recorded
    // By road; none but the first for roads that no piece took.
    std::array<std::unique_ptr<Event>, kMostRoads> landed;
  };
  struct Start {  // of the copies of one submission: their destinations may be written after it
    std::unique_ptr<Event> ready;
    std::mutex mutex;
    std::uint32_t awaited = 0;  // by the copy streams of these roads: their next copies need not wait again
  };
  // What leads to a lane's memory beside its device's own bus.
  struct Detours {
    // Of no change once they are open; null for one that was refused.
    std::vector<std::unique_ptr<Detour>> all;
    std::atomic<bool> are_open{false};
  };
  struct Job {
    std::uint32_t lane;
    Device* device;
    const Detours* detours;
    const Source* source;
    Piece piece;
    std::vector<Address> to;           // one for each segment
    std::vector<Pending*> tickets;     // one for each segment
    std::vector<Checksum*> checksums;  // the same; null for none
    std::shared_ptr<Start> start;
  };
  struct Way {
    Road* road;
    std::size_t number;  // among a lane's
  };

  void make_rings(Device& device);  // with the lock held
  Detours& closed_detours(std::uint32_t lane);
  std::vector<Refused> stage(std::vector<std::unique_ptr<Detour>>& detours);
  std::vector<Job> make_jobs(std::uint32_t lane, std::span<const Read> reads,
                             const std::shared_ptr<Start>& start);
  void await_slot(std::size_t worker);
  void note_copy(const Ring::Copied& copied);
  void settle_timeline();
  void give_back();
  void run(const Job& job, std::size_t worker);
  Way way_for(const Job& job, std::size_t worker) const;
  static void await(Start& start, const Way& way);
  // False if the workers were stopped meanwhile.
  bool read_in_place(const Job& job, std::size_t worker);
  std::size_t read_through_slot(const Job& job, std::size_t worker);
  static void check(const Job& job, std::size_t segment, const std::byte* bytes);
  void copy_out(const Job& job, Ring::Slot& slot, const Way& way);
  void timed_read(const Source& source, std::byte* out, std::size_t needed, std::size_t capacity,
                  std::uint64_t offset, std::size_t worker);
  void complete(const Job& job, std::size_t road);
  void record_landed(const Job& job, Pending& pending);
  std::unique_ptr<Event> take_event(std::uint32_t lane, std::size_t road = 0);  // with the lock held
  static Road& road(Device& own, const Detours& detours, std::size_t number);
  // With the lock held: until `ticket` is on its way; null if the time ran out.
  Pending* await_issue(Ticket ticket, std::chrono::milliseconds timeout, std::unique_lock<std::mutex>& lock);
  std::exception_ptr await_copies();

  const EngineOptions options_;
  const std::unique_ptr<Timeline> timeline_;
  const pid_t process_;

  // Held while slots and roads are given back, or made ready, which the other is not held for: the driver
  // may let that wait for all that a GPU does. Taken before it.
  std::mutex ending_;
  mutable std::mutex mutex_;  // guards what follows, up to the condition
  OpenFiles open_files_;
  std::vector<std::shared_ptr<const Source>> files_;  // after what they are of
  std::deque<Checksum> checksums_;                    // never moves its elements
  std::deque<std::unique_ptr<Device>> devices_;
  std::deque<Detours> detours_;  // by lane
  std::deque<Pending> pending_;
  std::vector<std::array<std::vector<std::unique_ptr<Event>>, kMostRoads>> spare_events_;  // by lane and road
  std::unique_ptr<HostMemory> slots_;
  std::deque<Ring> rings_;  // of the workers, each of which uses its own without the lock
  std::atomic<bool> has_rings_{false};
  bool closed_ = false;
  std::condition_variable progress_;

  std::atomic<std::uint64_t> bytes_read_{0};
  std::atomic<std::uint64_t> bytes_delivered_{0};
  std::atomic<std::uint64_t> bytes_detoured_{0};
  std::atomic<std::uint64_t> pieces_{0};
  std::atomic<std::uint64_t> read_nanoseconds_{0};
  std::atomic<std::uint64_t> slot_nanoseconds_{0};

  Workers<Job> workers_;  // last: its threads use all of the above
};

}  // namespace pyint8
