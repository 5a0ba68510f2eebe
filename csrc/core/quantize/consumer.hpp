// What happens to tensors on their device: bytes in, parameters out, without a word from the caller in
// between.
//
// One consumer for each GPU, with a thread, a stream and scratch of its own. The caller writes down what it
// wants as requests and gets tickets; between the two runs no Python and no lock is held that Python needs.
//
// The way of a weight to int8: it is cut into bands of rows that fit scratch, and the engine is asked for as
// many bands as have room. Once a band's copies are issued, the consumer's stream waits for them, and two
// things are put there: a kernel that casts (stored -> model dtype -> fp16) and marks rows that are not
// finite, and bitsandbytes' own quantizer, by its address. The band's room is free from then on: the copies
// of the next read into it wait for all that is on the stream. Bands whose codes lie behind one another, such
// as those of a mixture's experts, are quantized by one call where the next has landed already: to launch a
// kernel for each of thousands takes longer than the bus does.
//
// What is only cast goes the same way without the quantizer, and what is as stored goes straight to its
// place. Requests are served in order. A transposed weight arrives in bands of input rows, which are columns
// of what is quantized: its fp16 form is held whole, in memory that the caller gives.
//
// Where several ranks read together (see share.hpp), of a band that is large enough this one's part alone is
// asked for. Then the caller's thread gathers: it learns which bands come next, waits for its parts of them,
// exchanges these with the other ranks by whatever it has, and says so; the consumer's stream waits for that
// as for a copy. Requests being the same on all ranks, so is the order of these bands. What is gathered
// passes through scratch, if it stays as stored, too. Bands that are gathered at once must all be there
// first; so must what all read whole between them, as it is served in order: of what comes next, no more is
// listed than has room together.
//
// Knows the driver through Device alone; neither torch nor cudart. Where bitsandbytes has no such entry point
// (the CPU, another backend), its Python operator does this instead.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "device/device.hpp"
#include "quantize/request.hpp"
#include "quantize/scratch.hpp"
#include "quantize/share.hpp"
#include "transfer/engine.hpp"

namespace pyint8 {

struct ConsumerOptions {
  // Memory of the device for what passes through: seven eighths for bands as stored, one for the fp16 form of
  // the band being quantized. An eighth holds a row at least.
  Address scratch;
  std::size_t scratch_bytes;
  // For the fp16 form of one transposed weight at a time; as large as the largest. 0 where there is none.
  Address transposed;
  std::size_t transposed_bytes;
  Quantizer quantizer;
  Share share{};
};

// A band of which this rank has read its part.
struct Shared {
  Address memory;  // of the whole, in scratch
  std::size_t nbytes;
  std::size_t part;  // of each rank
};

class Consumer {
 public:
  // `engine` outlives this, but may be closed before. Throws kDriver where the driver refuses, or there are
  // no kernels, kInvalidArgument where scratch cannot be cut or there is no such rank, and kIo where no
  // thread can be started. In a child that was forked since, this is as little use as the engine is.
  Consumer(Engine& engine, std::uint32_t lane, const ConsumerOptions& options);
  // Closes.
  ~Consumer();
  Consumer(const Consumer&) = delete;
  Consumer& operator=(const Consumer&) = delete;

  // Takes requests, to be served in this order; returns the first one's ticket: they count up from 0.
  // Destinations are written only after what the caller has put on `stream` so far. `first`: what these read
  // is read ahead of all that was asked for on this lane, as what has landed behind it waits for it.
  // Throws kInvalidArgument, and takes none, where one cannot be served (see `bands_of`); a band is an eighth
  // of scratch.
  Ticket submit(std::span<const Request> requests, StreamHandle stream, bool first = false);

  // Waits up to `timeout` until all work for `ticket` is on the consumer's stream, then makes `stream` wait
  // for it; returns how many requests, from the first one on, `stream` waits for now, or nothing if the time
  // ran out. Throws the first error of the engine or the driver, or kCancelled.
  std::optional<Ticket> wait(Ticket ticket, StreamHandle stream, std::chrono::milliseconds timeout);

  // Requests, from the first one on, whose work is on the consumer's stream, all of it.
  Ticket done();

  // The sizes of bands that are still to be gathered, in order, but for the first `skipped`; `most` at most,
  // and one at least if there is one. Any of those that follow one another, and are 2 3/4 eighths of scratch
  // together at most, have room at once.
  std::vector<std::size_t> sizes_ahead(std::size_t skipped, std::size_t most);

  // Waits up to `timeout` until this rank's parts of the next `count` of them are on their way, then makes
  // `stream` wait for these; nothing if the time ran out, as it does for more than have room at once. Each is
  // waited for once. Throws as `wait`.
  std::optional<std::vector<Shared>> await_parts(std::size_t count, StreamHandle stream,
                                                 std::chrono::milliseconds timeout);

  // The next `count` of them are whole once all that is on `stream` so far is done. Throws kInvalidArgument
  // if there are not so many.
  void gathered(std::size_t count, StreamHandle stream);

  // Drops what has not begun, joins the thread and waits until no kernel uses any memory it was given.
  // Copies may still be under way: close the engine first. Idempotent; waits throw kCancelled from then on.
  void close();

 private:
  struct Task {
    Request request;
    std::vector<Band> bands;
    bool first;  // its bytes are read ahead of others
  };
  struct Asked {  // one band of one task
    const Task* task;
    const Band* band;
    Address memory;                         // where it lands
    std::optional<Ticket> ticket;           // the engine's; none for what has been waited for
    std::optional<Scratch::Region> region;  // none for what does not pass through scratch
    bool is_last;                           // of its task
  };
  struct ToGather {
    Shared band;
    std::size_t between;        // room in scratch for what is read whole behind the one before it
    std::vector<Ticket> own{};  // the engine's, of what this rank reads
    Ticket whole = 0;           // a promise of the engine's
  };
  // Bands that are cast, in the last eighth of scratch, and not quantized yet.
  struct Joined {
    ToInt8 to{};  // of the first
    std::size_t rows = 0;
    std::size_t columns = 0;
    Ticket tasks = 0;                // that are done with them
    std::unique_ptr<Event> begin{};  // of this work, for the timeline
    std::size_t nbytes = 0;          // as stored
  };
  // What is asked for at once.
  struct Asking {
    bool first = false;
    std::vector<Asked> bands{};
    std::vector<Read> reads{};
    std::vector<std::size_t> of_reads{};  // their places in `bands`
    std::vector<ToGather> to_gather{};
    std::vector<std::optional<std::size_t>> of_bands{};  // their places in `to_gather`
  };

  class Listing;

  void ask();
  void add_reads(Asking& asking, const Asked& asked);
  void submit(Asking& asking);
  std::size_t part_of(const Task& task, const Band& band) const;
  bool passes_scratch(const Task& task, const Band& band) const;
  void list_not_asked(Listing& listing) const;
  void throw_if_over() const;
  std::optional<Asked> place(const Task& task, const Band& band);
  void serve();
  bool await(const Asked& asked);
  void put_work(const Asked& asked);
  void put_work_of(const Asked& asked);
  void add_span(std::unique_ptr<Event> begin, std::size_t nbytes);
  void quantize_band(const Task& task, const ToInt8& to, const Asked& asked);
  void transpose_band(const Task& task, const ToInt8& to, const Asked& asked);
  void cast_band(const Task& task, const ToValues& to, const Asked& asked);
  void quantize(const ToInt8& to, Address half, std::size_t row, std::size_t rows, std::size_t columns);
  bool can_join(const Asked& asked) const;
  bool next_joins();
  void quantize_joined();
  void finish(const Asked& asked);
  bool is_over() const;
  void keep_error();

  Engine& engine_;
  const std::uint32_t lane_;
  const ConsumerOptions options_;
  const std::size_t band_bytes_;
  const Address half_;  // the last eighth of scratch
  Device& device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Event> reached_;  // of the caller's stream, or of this one, for as long as a call lasts
  Joined joined_;                   // the thread's own

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<Task> tasks_;     // never moves its elements
  std::size_t next_task_ = 0;  // whose next band is to be asked for
  std::size_t next_band_ = 0;
  Scratch scratch_;
  std::size_t passing_bytes_ = 0;   // in scratch, or on their way there
  std::deque<Asked> asked_;         // in order
  std::deque<ToGather> to_gather_;  // of these
  std::size_t between_ = 0;         // of the next one, so far
  Ticket done_ = 0;                 // tasks whose work is on the stream, all of it
  std::exception_ptr error_;
  bool closed_ = false;

  std::mutex join_mutex_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace pyint8
