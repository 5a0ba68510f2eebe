// Arguments, the GIL and errors; nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <optional>
#include <system_error>
#include <tuple>
#include <variant>

#include "device/detour_cuda.hpp"
#include "device/device_cuda.hpp"
#include "device/device_host.hpp"
#include "device/kernel_images.hpp"
#include "error.hpp"
#include "numeric/crc32c.hpp"
#include "python_source.hpp"
#include "quantize/consumer.hpp"
#include "transfer/engine.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace pyint8 {
namespace {

// How long a wait may keep Python from handling Ctrl-C.
constexpr std::chrono::milliseconds kSignalInterval{50};

// Device, inode, size and mtime_ns.
using StampTuple = std::tuple<std::uint64_t, std::uint64_t, std::int64_t, std::int64_t>;
// File, offset, bytes, and where to.
using ReadTuple = std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, Address>;

// The class and its fields are chosen in pyint8/errors.py.
void raise(const Error& error) {
  const auto offset = error.offset();
  py::object path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path().c_str()));
  py::object exception =
      py::module_::import("pyint8.errors")
          .attr("from_core")(name_of(error.code()), error.message(), path,
                             offset ? py::object(py::int_(*offset)) : py::none(), error.system_errno());
  PyErr_SetObject(py::type::handle_of(exception).ptr(), exception.ptr());
}

std::uint32_t add_file(Engine& engine, const std::string& path, const std::optional<StampTuple>& stamp) {
  if (!stamp.has_value()) return engine.add_file(path);
  const auto& [device, inode, size, mtime_ns] = *stamp;
  return engine.add_file(path, FileStamp{device, inode, size, mtime_ns});
}

std::uint32_t add_source(Engine& engine, py::object ranges, py::object cancel, py::object run) {
  const auto source = std::make_shared<PythonSource>(std::move(ranges), std::move(cancel), std::move(run));
  const py::gil_scoped_release released;
  return engine.add_source(source);
}

// `checksums`: one for each read, or none at all.
Ticket submit(Engine& engine, std::uint32_t lane, const std::vector<ReadTuple>& tuples, StreamHandle stream,
              bool first, const std::vector<std::uint32_t>& checksums) {
  const py::gil_scoped_release released;
  if (!checksums.empty() && checksums.size() != tuples.size()) {
    throw Error(ErrorCode::kInvalidArgument, "there are not as many checksums as reads");
  }
  std::vector<Read> reads;
  reads.reserve(tuples.size());
  for (const auto& [file, offset, nbytes, to] : tuples) {
    reads.push_back({{file, offset, nbytes, checksums.empty() ? kUnchecked : checksums[reads.size()]}, to});
  }
  return engine.submit(lane, reads, stream, first);
}

// What `look` finds within a time that it is given, asked until it finds something or a signal raises. It is
// first given no time, and Python's lock is kept: who gives it away while another thread computes waits for
// milliseconds until he has it again.
template <typename Look>
auto look_until_found(const Look& look) {
  auto found = look(std::chrono::milliseconds(0));
  while (!found) {
    {
      const py::gil_scoped_release released;
      found = look(kSignalInterval);
    }
    if (!found && PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  return found;
}

void wait(Engine& engine, Ticket ticket, StreamHandle stream) {
  look_until_found([&](std::chrono::milliseconds time) { return engine.wait(ticket, stream, time); });
}

bool wait_all(Engine& engine, const std::vector<Ticket>& tickets, StreamHandle stream,
              std::uint32_t milliseconds) {
  const py::gil_scoped_release released;
  return engine.wait_all(tickets, stream, std::chrono::milliseconds(milliseconds));
}

// By the names of the safetensors format.
ElementType element_type(const std::string& dtype) {
  if (dtype == "F16") return ElementType::kHalf;
  if (dtype == "BF16") return ElementType::kBFloat16;
  if (dtype == "F32") return ElementType::kFloat;
  throw Error(ErrorCode::kInvalidArgument, "no kernel reads " + dtype + "; F16, BF16 and F32 are read");
}

// Where rows come from: (false, file, offset, checksum), or (true, ticket, address, 0) of what has landed.
using FromTuple = std::tuple<bool, std::uint64_t, std::uint64_t, std::uint32_t>;
// What becomes of them: int8 codes by (through bfloat16, transposed, codes, scales), or (dtype, values),
// where
// "" leaves values as they are stored.
using Int8Tuple = std::tuple<bool, bool, Address, Address>;
using ValuesTuple = std::tuple<std::string, Address>;
using RequestTuple = std::tuple<FromTuple, std::string, std::size_t, std::size_t,
                                std::variant<Int8Tuple, ValuesTuple>, Address>;

Request request_of(const RequestTuple& tuple) {
  const auto& [from_tuple, stored, rows, columns, to_tuple, marks] = tuple;
  Request request{{}, ElementType::kHalf, rows, columns, {}, marks};
  std::size_t row_bytes = columns;
  if (const auto* to = std::get_if<ValuesTuple>(&to_tuple)) {
    const auto& [dtype, values] = *to;
    request.to = ToValues{dtype.empty() ? std::nullopt : std::optional(element_type(dtype)), values};
  } else {
    const auto& [through_bfloat16, transposed, codes, scales] = std::get<Int8Tuple>(to_tuple);
    request.to = ToInt8{through_bfloat16, transposed, codes, scales};
  }
  const auto* values = std::get_if<ToValues>(&request.to);
  if (values == nullptr || values->dtype) {
    request.stored = element_type(stored);
    row_bytes *= size_of(request.stored);
  }
  const auto& [has_landed, where, offset, checksum] = from_tuple;
  if (has_landed) {
    request.from = Landed{where, offset};
  } else {
    request.from = Range{static_cast<std::uint32_t>(where), offset, rows * row_bytes, checksum};
  }
  return request;
}

Ticket submit_requests(Consumer& consumer, const std::vector<RequestTuple>& tuples, StreamHandle stream,
                       bool first) {
  const py::gil_scoped_release released;
  std::vector<Request> requests;
  requests.reserve(tuples.size());
  for (const RequestTuple& tuple : tuples) requests.push_back(request_of(tuple));
  return consumer.submit(requests, stream, first);
}

// (address, bytes, each rank's part of them), in order; nothing if the time ran out.
using SharedTuple = std::tuple<Address, std::size_t, std::size_t>;

std::optional<std::vector<SharedTuple>> await_parts(Consumer& consumer, std::size_t count,
                                                    StreamHandle stream, std::uint32_t milliseconds) {
  auto found = consumer.await_parts(count, stream, std::chrono::milliseconds(0));  // as in look_until_found
  if (!found) {
    const py::gil_scoped_release released;
    found = consumer.await_parts(count, stream, std::chrono::milliseconds(milliseconds));
  }
  if (!found) return std::nullopt;
  std::vector<SharedTuple> tuples;
  for (const auto& [memory, nbytes, part] : *found) tuples.emplace_back(memory, nbytes, part);
  return tuples;
}

using PartTuple = std::tuple<std::size_t, std::size_t, bool>;

std::vector<PartTuple> spans_of(const Share& share, std::size_t nbytes) {
  std::vector<PartTuple> tuples;
  for (const auto [begin, end, is_part] : share.spans_of(nbytes)) tuples.emplace_back(begin, end, is_part);
  return tuples;
}

Ticket wait_for_request(Consumer& consumer, Ticket ticket, StreamHandle stream) {
  return *look_until_found(
      [&](std::chrono::milliseconds time) { return consumer.wait(ticket, stream, time); });
}

void transpose(Engine& engine, std::uint32_t lane, Address from, const std::string& dtype,
               bool through_bfloat16, std::size_t rows, std::size_t columns, Address to,
               std::size_t to_stride, StreamHandle stream) {
  const py::gil_scoped_release released;
  const TransposeJob job{from, element_type(dtype), through_bfloat16, rows, columns, to, to_stride};
  engine.transpose_to_half(lane, job, stream);
}

// An engine joins its workers when it goes; they may be in a slow read, and other Python threads need not
// wait. So a consumer does. A process that was forked since has no such threads, and leaks both.
struct WithoutGil {
  pid_t process = ::getpid();

  template <typename T>
  void operator()(T* owned) const {
    if (::getpid() != process) return;
    const py::gil_scoped_release released;
    delete owned;
  }
};
using EngineHolder = std::unique_ptr<Engine, WithoutGil>;
using ConsumerHolder = std::unique_ptr<Consumer, WithoutGil>;

ConsumerHolder make_consumer(Engine& engine, std::uint32_t lane, Address scratch, std::size_t scratch_bytes,
                             Address transposed, std::size_t transposed_bytes, Address quantizer,
                             const Share& share) {
  const py::gil_scoped_release released;
  return ConsumerHolder(new Consumer(
      engine, lane,
      {scratch, scratch_bytes, transposed, transposed_bytes, reinterpret_cast<Quantizer>(quantizer), share}));
}

std::uint32_t add_cuda_device(Engine& engine, int ordinal, const std::string& library) {
  const py::gil_scoped_release released;
  return engine.add_device(std::make_unique<CudaDevice>(CudaApi::open(library), ordinal));
}

// (GPU, why not) of the neighbours over whose buses nothing can go.
std::vector<std::pair<int, std::string>> add_detours(Engine& engine, std::uint32_t lane, int ordinal,
                                                     const std::vector<int>& neighbours,
                                                     const std::string& library) {
  const py::gil_scoped_release released;
  const auto api = CudaApi::open(library);
  std::vector<std::unique_ptr<Detour>> detours;
  std::vector<int> gpus;  // of these
  std::vector<std::pair<int, std::string>> refused;
  for (const int neighbour : neighbours) {
    try {
      detours.push_back(std::make_unique<CudaDetour>(api, neighbour, ordinal));
      gpus.push_back(neighbour);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kDriver) throw;
      refused.emplace_back(neighbour, error.message());
    }
  }
  if (detours.empty()) return refused;
  for (const auto& [number, reason] : engine.add_detours(lane, std::move(detours))) {
    refused.emplace_back(gpus[number], reason);
  }
  return refused;
}

py::dict stats(const Engine& engine) {
  const Stats stats = engine.stats();
  return py::dict("bytes_read"_a = stats.bytes_read, "bytes_delivered"_a = stats.bytes_delivered,
                  "bytes_detoured"_a = stats.bytes_detoured, "pieces"_a = stats.pieces,
                  "read_seconds"_a = stats.read_seconds, "slot_seconds"_a = stats.slot_seconds);
}

std::uint32_t checksum_of(const py::buffer& bytes, std::uint32_t before) {
  const py::buffer_info info = bytes.request();
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) {
    throw Error(ErrorCode::kInvalidArgument, "the buffer is not contiguous");
  }
  const std::span span(static_cast<const std::byte*>(info.ptr),
                       static_cast<std::size_t>(info.size * info.itemsize));
  const py::gil_scoped_release released;
  return crc32c(span, before);
}

using SumTuple = std::pair<std::uint32_t, std::uint64_t>;

std::pair<SumTuple, SumTuple> sums_of(const Engine& engine, std::uint32_t checksum) {
  const Checksum::Sum whole = engine.sum_of(checksum), parts = engine.sum_of(checksum_of_parts(checksum));
  return {{whole.value, whole.nbytes}, {parts.value, parts.nbytes}};
}

const char* name_of(Doing doing) {
  switch (doing) {
    case Doing::kWaiting:
      return "waiting";
    case Doing::kReading:
      return "reading";
    case Doing::kCopying:
      return "copying";
    case Doing::kQuantizing:
      return "quantizing";
  }
  return "";
}

// (what, by which worker or lane, begin, end, bytes)
using SpanTuple = std::tuple<std::string, std::uint32_t, double, double, std::uint64_t>;

std::vector<SpanTuple> spans(Engine& engine) {
  std::vector<SpanTuple> tuples;
  if (engine.timeline() == nullptr) return tuples;
  for (const Span& span : engine.timeline()->spans()) {
    tuples.emplace_back(name_of(span.doing), span.who, span.begin, span.end, span.nbytes);
  }
  return tuples;
}

}  // namespace

// Without py::mod_gil_not_used, so a free-threaded Python takes its lock again when it imports this: what
// Python code shares between threads around the engine has not been shown to be safe without the lock.
PYBIND11_MODULE(_core, module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    } catch (const PythonFailure& failure) {
      failure.restore();
    } catch (const std::system_error& error) {
      raise(refused_thread(error));
    }
  });

  py::class_<Engine, EngineHolder>(module, "Engine")
      .def(py::init([](std::size_t threads, std::size_t slots_per_thread, std::size_t slot_bytes,
                       bool direct_io, bool timeline) {
             return EngineHolder(new Engine({threads, slots_per_thread, slot_bytes, direct_io, timeline}));
           }),
           py::kw_only(), "threads"_a, "slots_per_thread"_a, "slot_bytes"_a, "direct_io"_a,
           "timeline"_a = false)
      .def("add_file", &add_file, "path"_a, "stamp"_a = py::none(), py::call_guard<py::gil_scoped_release>())
      .def("add_source", &add_source, "ranges"_a, "cancel"_a, "run"_a = py::none())
      .def(
          "add_checksum",
          [](Engine& engine, std::string path, std::uint32_t file, std::uint64_t offset, std::uint64_t nbytes,
             std::uint32_t expected) {
            return engine.add_checksum(std::move(path), {file, offset, nbytes}, expected);
          },
          "path"_a, "file"_a, "offset"_a, "nbytes"_a, "expected"_a, py::call_guard<py::gil_scoped_release>())
      .def(
          "add_shared_checksum",
          [](Engine& engine, std::uint32_t file, std::uint64_t offset, std::uint64_t nbytes) {
            return engine.add_shared_checksum({file, offset, nbytes});
          },
          "file"_a, "offset"_a, "nbytes"_a, py::call_guard<py::gil_scoped_release>())
      .def("sums_of", &sums_of, "checksum"_a)
      .def(
          "add_host_device",
          [](Engine& engine, std::size_t threads) {
            return engine.add_device(std::make_unique<HostDevice>(threads));
          },
          "threads"_a)
      .def("add_discarding_device",
           [](Engine& engine) { return engine.add_device(std::make_unique<DiscardingDevice>()); })
      .def("add_cuda_device", &add_cuda_device, "ordinal"_a, "library"_a)
      .def("add_detours", &add_detours, "lane"_a, "ordinal"_a, "neighbours"_a, "library"_a)
      .def("prepare", &Engine::prepare, "lane"_a, py::call_guard<py::gil_scoped_release>())
      .def("submit", &submit, "lane"_a, "reads"_a, "stream"_a, py::kw_only(), "first"_a,
           "checksums"_a = std::vector<std::uint32_t>())
      .def("wait", &wait, "ticket"_a, "stream"_a)
      .def("wait_all", &wait_all, "tickets"_a, "stream"_a, "milliseconds"_a)
      .def("promise", &Engine::promise, "lane"_a, "count"_a)
      .def("keep_promise", &Engine::keep_promise, "first"_a, "count"_a, "stream"_a)
      .def("transpose_to_half", &transpose, "lane"_a, "source"_a, "dtype"_a, "through_bfloat16"_a, "rows"_a,
           "columns"_a, "destination"_a, "destination_stride"_a, "stream"_a)
      .def("require_unchanged", &Engine::require_unchanged, py::call_guard<py::gil_scoped_release>())
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>())
      .def("stats", &stats)
      .def("spans", &spans);

  py::class_<Share>(module, "Share")
      .def(py::init([](std::uint32_t rank, std::uint32_t ranks, std::size_t least_bytes) {
             const Share share{rank, ranks, least_bytes};
             validate(share);
             return share;
           }),
           "rank"_a, "ranks"_a, "least_bytes"_a)
      .def("part_of", &Share::part_of, "nbytes"_a)
      .def("spans_of", &spans_of, "nbytes"_a);

  py::class_<Consumer, ConsumerHolder>(module, "Consumer")
      .def(py::init(&make_consumer), "engine"_a, "lane"_a, py::kw_only(), "scratch"_a, "scratch_bytes"_a,
           "transposed"_a, "transposed_bytes"_a, "quantizer"_a, "share"_a = Share{}, py::keep_alive<1, 2>())
      .def("submit", &submit_requests, "requests"_a, "stream"_a, py::kw_only(), "first"_a)
      .def("wait", &wait_for_request, "ticket"_a, "stream"_a)
      .def("done", &Consumer::done)
      .def("sizes_ahead", &Consumer::sizes_ahead, "skipped"_a, "most"_a)
      .def("await_parts", &await_parts, "count"_a, "stream"_a, "milliseconds"_a)
      .def("gathered", &Consumer::gathered, "count"_a, "stream"_a)
      .def("close", &Consumer::close, py::call_guard<py::gil_scoped_release>());

  module.attr("UNCHECKED") = kUnchecked;
  module.def("checksum_of_parts", &checksum_of_parts, "checksum"_a);
  module.def("crc32c", &checksum_of, "bytes"_a, "before"_a = 0);
  module.def("has_kernels", [] { return !kernel_images().empty(); });
  module.def("pinned_bytes_in_use", &pinned_bytes_in_use);
}

}  // namespace pyint8
