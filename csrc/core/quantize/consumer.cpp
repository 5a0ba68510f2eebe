#include "quantize/consumer.hpp"

#include <algorithm>
#include <string>
#include <system_error>
#include <utility>

#include "error.hpp"

namespace pyint8 {
namespace {

// Of scratch. Where bands are gathered, smaller ones: of more of them, half can be gathered at once.
constexpr std::size_t kParts = 8;
constexpr std::size_t kSharedParts = 12;
constexpr std::size_t kHalfBytes = 2;
// How long the thread may take to see that it was closed.
constexpr std::chrono::milliseconds kInterval{50};

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorCode::kInvalidArgument, why);
}

std::size_t parts_of(const ConsumerOptions& options) {
  return options.share.ranks > 1 ? kSharedParts : kParts;
}

std::size_t band_bytes(const ConsumerOptions& options) {
  validate(options.share);
  const std::size_t bytes = options.scratch_bytes / parts_of(options) / kScratchAlignment * kScratchAlignment;
  if (bytes == 0) {
    refuse("scratch of " + std::to_string(options.scratch_bytes) + " bytes cannot be cut into bands");
  }
  return bytes;
}

}  // namespace

// Bands to be gathered, as far as any of them that are gathered at once have room in scratch together.
//
// Once all before the first of them is served, it is the oldest there. A band that has no room then finds
// less than its size free at either end of what is taken: so nine of the eleven parts are, at least. What is
// gathered at once may be 6 1/2 of these (pyint8/streaming/ranks/consumer.py); two are for all else from the
// first to the last, which is what is read whole, and what is lost to alignment. Where the list ends follows
// from the requests and from where it begins, so all ranks' lists are beginnings of the same.
class Consumer::Listing {
 public:
  Listing(std::size_t skipped, std::size_t most, std::size_t band_bytes)
      : skipped_(skipped), most_(most), spare_(2 * band_bytes) {}

  void add(std::size_t nbytes, std::size_t between) {
    if (skipped_ > 0) {
      --skipped_;
      return;
    }
    const std::size_t beside = Scratch::room_for(nbytes) - nbytes + (sizes.empty() ? 0 : between);
    is_cut_ = beside > spare_ && !sizes.empty();
    if (is_full()) return;
    sizes.push_back(nbytes);
    spare_ -= std::min(spare_, beside);
  }
  bool is_full() const { return is_cut_ || sizes.size() >= most_; }

  std::vector<std::size_t> sizes{};

 private:
  std::size_t skipped_;
  const std::size_t most_;
  std::size_t spare_;
  bool is_cut_ = false;
};

Consumer::Consumer(Engine& engine, std::uint32_t lane, const ConsumerOptions& options)
    : engine_(engine),
      lane_(lane),
      options_(options),
      band_bytes_(band_bytes(options)),
      half_(options.scratch + (parts_of(options) - 1) * band_bytes_),
      device_(engine.device(lane)),
      stream_(device_.make_stream()),
      reached_(device_.make_event()),
      scratch_((parts_of(options) - 1) * band_bytes_) {
  device_.prepare_kernels();
  try {
    thread_ = std::thread([this] { serve(); });
  } catch (const std::system_error& error) {
    throw refused_thread(error);
  }
}

Consumer::~Consumer() {
  try {
    close();
  } catch (...) {  // the driver has failed: its work is over
  }
}

Ticket Consumer::submit(std::span<const Request> requests, StreamHandle stream, bool first) {
  engine_.require_own_process();
  std::vector<Task> tasks;
  tasks.reserve(requests.size());
  const Room room{band_bytes_, options_.transposed_bytes, options_.share.ranks > 1};
  for (const Request& request : requests) tasks.push_back({request, bands_of(request, room), first});

  const std::lock_guard lock(mutex_);
  throw_if_over();
  device_.record_on(stream, *reached_);
  device_.stream_waits_for(stream_->handle(), *reached_);
  const Ticket ticket = tasks_.size();
  tasks_.insert(tasks_.end(), std::make_move_iterator(tasks.begin()), std::make_move_iterator(tasks.end()));
  try {
    ask();
  } catch (...) {  // what was taken will not come
    keep_error();
    throw;
  }
  changed_.notify_all();
  return ticket;
}

// Asks for all that has room, in order; once a whole band has, so that small tensors are asked for together.
void Consumer::ask() {
  if (passing_bytes_ + band_bytes_ > scratch_.size()) return;
  Asking asking;
  while (next_task_ < tasks_.size()) {
    const Task& task = tasks_[next_task_];
    std::optional<Asked> asked = place(task, task.bands[next_band_]);
    if (!asked) break;
    if (task.first != asking.first) {
      submit(asking);
      asking = {.first = task.first};
    }
    add_reads(asking, *asked);
    if (++next_band_ == task.bands.size()) {
      ++next_task_;
      next_band_ = 0;
    }
  }
  submit(asking);
}

// Of a band that is to be gathered, this rank's part; else of the whole, unless it has landed.
void Consumer::add_reads(Asking& asking, const Asked& asked) {
  const Band& band = *asked.band;
  const std::size_t part = part_of(*asked.task, band);
  if (const auto* range = std::get_if<Range>(&asked.task->request.from)) {
    for (const auto [begin, end, is_part] : options_.share.spans_of(band.nbytes)) {
      const std::uint32_t checksum = is_part ? checksum_of_parts(range->checksum) : range->checksum;
      const Range own{range->file, range->offset + band.start + begin, end - begin, checksum};
      asking.reads.push_back({own, asked.memory + begin});
      asking.of_reads.push_back(asking.bands.size());
    }
  }
  asking.of_bands.push_back(part == 0 ? std::nullopt : std::optional(asking.to_gather.size()));
  if (part > 0) {
    asking.to_gather.push_back({{asked.memory, band.nbytes, part}, std::exchange(between_, 0)});
  } else if (asked.region) {
    between_ += Scratch::room_for(band.nbytes);
  }
  asking.bands.push_back(asked);
}

void Consumer::submit(Asking& asking) {
  auto& [is_first, bands, reads, of_reads, to_gather, of_bands] = asking;
  if (!to_gather.empty()) {
    const Ticket first = engine_.promise(lane_, to_gather.size());
    for (std::size_t i = 0; i < to_gather.size(); ++i) to_gather[i].whole = first + i;
  }
  const Ticket first = reads.empty() ? 0 : engine_.submit(lane_, reads, stream_->handle(), is_first);
  for (std::size_t i = 0; i < reads.size(); ++i) {
    const std::optional<std::size_t> place = of_bands[of_reads[i]];
    if (place) to_gather[*place].own.push_back(first + i);
    bands[of_reads[i]].ticket = place ? to_gather[*place].whole : first + i;
  }
  asked_.insert(asked_.end(), bands.begin(), bands.end());
  to_gather_.insert(to_gather_.end(), to_gather.begin(), to_gather.end());
}

std::size_t Consumer::part_of(const Task& task, const Band& band) const {
  return std::holds_alternative<Range>(task.request.from) ? options_.share.part_of(band.nbytes) : 0;
}

bool Consumer::passes_scratch(const Task& task, const Band& band) const {
  if (!std::holds_alternative<Range>(task.request.from)) return false;
  return !stays_as_stored(task.request) || part_of(task, band) > 0;
}

// Where a band lands, or has landed; nothing while there is no room.
std::optional<Consumer::Asked> Consumer::place(const Task& task, const Band& band) {
  const bool is_last = &band == &task.bands.back();
  if (const auto* landed = std::get_if<Landed>(&task.request.from)) {
    const auto ticket = band.row == 0 ? std::optional(landed->ticket) : std::nullopt;
    return Asked{&task, &band, landed->memory + band.start, ticket, std::nullopt, is_last};
  }
  if (!passes_scratch(task, band)) {
    const Address values = std::get<ToValues>(task.request.to).values + band.start;
    return Asked{&task, &band, values, std::nullopt, std::nullopt, is_last};
  }
  const std::optional<Scratch::Region> region = scratch_.acquire(band.nbytes);
  if (!region) return std::nullopt;
  passing_bytes_ += band.nbytes;
  return Asked{&task, &band, options_.scratch + scratch_.start_of(*region), std::nullopt, region, is_last};
}

void Consumer::serve() {
  try {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return is_over() || !asked_.empty(); });
      if (is_over()) return;
      const Asked asked = asked_.front();
      lock.unlock();
      if (!await(asked)) return;
      put_work(asked);
      finish(asked);
      if (joined_.rows > 0 && !next_joins()) quantize_joined();
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    keep_error();
  }
}

bool Consumer::is_over() const {
  return closed_ || error_ != nullptr;
}

void Consumer::throw_if_over() const {
  if (error_ != nullptr) std::rethrow_exception(error_);
  if (closed_) throw Error(ErrorCode::kCancelled, "the stream was closed");
}

// Until the band's copies are ordered before this stream; false if it was over meanwhile.
bool Consumer::await(const Asked& asked) {
  if (!asked.ticket) return true;
  while (!engine_.wait(*asked.ticket, stream_->handle(), kInterval)) {
    const std::lock_guard lock(mutex_);
    if (is_over()) return false;
  }
  return true;
}

void Consumer::put_work(const Asked& asked) {
  Timeline* timeline = engine_.timeline();
  const bool goes_on = joined_.rows > 0;
  std::unique_ptr<Event> begin =
      timeline == nullptr || goes_on ? nullptr : timeline->mark(lane_, stream_->handle());
  put_work_of(asked);
  if (joined_.rows > 0) {  // the rest of it is to come
    if (!goes_on) joined_.begin = std::move(begin);
    joined_.nbytes += asked.band->nbytes;
  } else if (begin != nullptr) {
    add_span(std::move(begin), asked.band->nbytes);
  }
}

void Consumer::add_span(std::unique_ptr<Event> begin, std::size_t nbytes) {
  Timeline* timeline = engine_.timeline();
  timeline->add_work(Doing::kQuantizing, lane_, std::move(begin), timeline->mark(lane_, stream_->handle()),
                     nbytes);
}

void Consumer::put_work_of(const Asked& asked) {
  const Task& task = *asked.task;
  if (stays_as_stored(task.request)) {
    const Address values = std::get<ToValues>(task.request.to).values + asked.band->start;
    if (asked.memory == values) return;  // it landed in its place
    device_.copy_on_device(values, asked.memory, asked.band->nbytes, stream_->handle());
  } else if (const auto* to = std::get_if<ToValues>(&task.request.to)) {
    cast_band(task, *to, asked);
  } else if (is_transposed(task.request)) {
    transpose_band(task, std::get<ToInt8>(task.request.to), asked);
  } else {
    quantize_band(task, std::get<ToInt8>(task.request.to), asked);
  }
}

void Consumer::quantize_band(const Task& task, const ToInt8& to, const Asked& asked) {
  const Request& request = task.request;
  const Band& band = *asked.band;
  const Address marks = request.marks == 0 ? 0 : request.marks + band.row;
  if (joined_.rows == 0) {
    joined_.to = to;
    joined_.to.codes += band.row * request.columns;
    joined_.to.scales += band.row * sizeof(float);
    joined_.columns = request.columns;
  }
  device_.cast({.from = asked.memory,
                .type = request.stored,
                .through_bfloat16 = to.through_bfloat16,
                .elements = band.rows * request.columns,
                .to = half_ + joined_.rows * joined_.columns * kHalfBytes,
                .to_type = ElementType::kHalf,
                .marks_at = marks,
                .elements_per_mark = request.columns},
               stream_->handle());
  joined_.rows += band.rows;
}

// Whether its codes and scales go behind those of the bands that are joined, and its fp16 form has room.
bool Consumer::can_join(const Asked& asked) const {
  const Request& request = asked.task->request;
  const auto* to = std::get_if<ToInt8>(&request.to);
  if (to == nullptr || is_transposed(request) || request.columns != joined_.columns) return false;
  const Band& band = *asked.band;
  const std::size_t elements = joined_.rows * joined_.columns;
  return to->codes + band.row * request.columns == joined_.to.codes + elements &&
         to->scales + band.row * sizeof(float) == joined_.to.scales + joined_.rows * sizeof(float) &&
         (elements + band.rows * request.columns) * kHalfBytes <= band_bytes_;
}

// Whether there is something to join that has landed: nothing is quantized later than it could be.
bool Consumer::next_joins() {
  std::optional<Ticket> ticket;
  {
    const std::lock_guard lock(mutex_);
    if (asked_.empty() || !can_join(asked_.front())) return false;
    ticket = asked_.front().ticket;
  }
  return !ticket || engine_.is_on_its_way(*ticket, std::chrono::milliseconds(0));
}

void Consumer::quantize_joined() {
  quantize(joined_.to, half_, 0, joined_.rows, joined_.columns);
  Joined joined = std::exchange(joined_, {});
  if (joined.begin != nullptr) add_span(std::move(joined.begin), joined.nbytes);
  const std::lock_guard lock(mutex_);
  done_ += joined.tasks;
  changed_.notify_all();
}

// Its rows are columns of what is quantized, which must be whole; a last look at it marks what is not finite.
// It is quantized in bands as well: bitsandbytes counts the elements of one call in 32 bits.
void Consumer::transpose_band(const Task& task, const ToInt8& to, const Asked& asked) {
  const Request& request = task.request;
  const Band& band = *asked.band;
  device_.transpose_to_half({asked.memory, request.stored, to.through_bfloat16, band.rows, request.columns,
                             options_.transposed + band.row * kHalfBytes, request.rows},
                            stream_->handle());
  if (!asked.is_last) return;
  if (request.marks != 0) {
    device_.cast({.from = options_.transposed,
                  .type = ElementType::kHalf,
                  .through_bfloat16 = false,
                  .elements = request.rows * request.columns,
                  .to = options_.transposed,
                  .to_type = ElementType::kHalf,
                  .marks_at = request.marks,
                  .elements_per_mark = request.rows},
                 stream_->handle());
  }
  const std::size_t row_bytes = request.rows * kHalfBytes;
  for (const Band& part : cut_into_bands(request.columns, row_bytes, band_bytes_)) {
    quantize(to, options_.transposed + part.start, part.row, part.rows, request.rows);
  }
}

void Consumer::cast_band(const Task& task, const ToValues& to, const Asked& asked) {
  const Request& request = task.request;
  const Band& band = *asked.band;
  const std::size_t elements = band.rows * request.columns;
  const ElementType dtype = to.dtype.value_or(request.stored);
  device_.cast({.from = asked.memory,
                .type = request.stored,
                .through_bfloat16 = false,
                .elements = elements,
                .to = to.values + band.row * request.columns * size_of(dtype),
                .to_type = dtype,
                .marks_at = request.marks,
                .elements_per_mark = elements,
                .marks = Marks::kOverflow},
               stream_->handle());
}

void Consumer::quantize(const ToInt8& to, Address half, std::size_t row, std::size_t rows,
                        std::size_t columns) {
  device_.quantize(options_.quantizer,
                   {.half = half,
                    .codes = to.codes + row * columns,
                    .scales = to.scales + row * sizeof(float),
                    .rows = static_cast<int>(rows),
                    .columns = static_cast<int>(columns)},
                   stream_->handle());
}

void Consumer::finish(const Asked& asked) {
  const std::lock_guard lock(mutex_);
  asked_.pop_front();
  if (asked.region) {
    scratch_.release(*asked.region);
    passing_bytes_ -= asked.band->nbytes;
  }
  if (asked.is_last) ++(joined_.rows > 0 ? joined_.tasks : done_);
  if (!is_over()) ask();
  changed_.notify_all();
}

// With the lock held: the exception that is being handled ends everything, if it is the first.
void Consumer::keep_error() {
  if (error_ == nullptr) error_ = std::current_exception();
  changed_.notify_all();
}

std::optional<Ticket> Consumer::wait(Ticket ticket, StreamHandle stream, std::chrono::milliseconds timeout) {
  engine_.require_own_process();
  std::unique_lock lock(mutex_);
  if (ticket >= tasks_.size()) refuse("there is no ticket " + std::to_string(ticket));
  const bool has_come = changed_.wait_for(lock, timeout, [&] { return done_ > ticket || is_over(); });
  if (!has_come) return std::nullopt;
  throw_if_over();
  device_.record_on(stream_->handle(), *reached_);
  device_.stream_waits_for(stream, *reached_);
  return done_;
}

Ticket Consumer::done() {
  engine_.require_own_process();
  const std::lock_guard lock(mutex_);
  return done_;
}

std::vector<std::size_t> Consumer::sizes_ahead(std::size_t skipped, std::size_t most) {
  engine_.require_own_process();
  const std::lock_guard lock(mutex_);
  Listing listing(skipped, most, band_bytes_);
  for (std::size_t i = 0; i < to_gather_.size() && !listing.is_full(); ++i) {
    listing.add(to_gather_[i].band.nbytes, to_gather_[i].between);
  }
  list_not_asked(listing);
  return std::move(listing.sizes);
}

void Consumer::list_not_asked(Listing& listing) const {
  std::size_t between = between_, number = next_band_;
  for (std::size_t next = next_task_; next < tasks_.size(); ++next, number = 0) {
    const Task& task = tasks_[next];
    for (; number < task.bands.size(); ++number) {
      if (listing.is_full()) return;
      const Band& band = task.bands[number];
      if (part_of(task, band) > 0) {
        listing.add(band.nbytes, std::exchange(between, 0));
      } else if (passes_scratch(task, band)) {
        between += Scratch::room_for(band.nbytes);
      }
    }
  }
}

std::optional<std::vector<Shared>> Consumer::await_parts(std::size_t count, StreamHandle stream,
                                                         std::chrono::milliseconds timeout) {
  engine_.require_own_process();
  const auto until = std::chrono::steady_clock::now() + timeout;
  std::vector<Shared> bands;
  std::vector<Ticket> own;
  {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, until, [&] { return to_gather_.size() >= count || is_over(); })) {
      return std::nullopt;
    }
    throw_if_over();
    for (std::size_t i = 0; i < count; ++i) {
      bands.push_back(to_gather_[i].band);
      own.insert(own.end(), to_gather_[i].own.begin(), to_gather_[i].own.end());
    }
  }
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
  if (!engine_.wait_all(own, stream, left)) return std::nullopt;
  return bands;
}

void Consumer::gathered(std::size_t count, StreamHandle stream) {
  engine_.require_own_process();
  const std::lock_guard lock(mutex_);
  if (count > to_gather_.size()) refuse("there are not so many bands to be gathered");
  for (; count > 0; --count) {
    engine_.keep_promise(to_gather_.front().whole, 1, stream);
    to_gather_.pop_front();
  }
}

void Consumer::close() {
  if (!engine_.is_of_this_process()) return;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
  const std::lock_guard joining(join_mutex_);  // another thread may be closing too
  if (thread_.joinable()) thread_.join();
  try {
    stream_->synchronize();
  } catch (const Error&) {  // where asking itself failed, kernels may still use the memory that goes next
    stream_->synchronize();
    throw;
  }
  std::unique_lock lock(mutex_);
  const bool has_failed = error_ != nullptr;  // which is what shall be told, then
  lock.unlock();
  if (engine_.timeline() != nullptr && !has_failed) engine_.timeline()->settle();
}

}  // namespace pyint8
