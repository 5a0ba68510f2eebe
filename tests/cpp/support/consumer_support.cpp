#include "consumer_support.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "fake_cuda_kernels.hpp"
#include "memory.hpp"

namespace pyint8::testing {
namespace {

constexpr ElementType kTypes[] = {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat};
constexpr std::size_t kGuard = 12;  // so that nothing is aligned to what a GPU loads at once
constexpr std::byte kUntouched{0x5a};
constexpr std::size_t kMostElements = 3000;

template <typename T>
T element(const Bytes& bytes, std::size_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
  return value;
}

template <typename T>
void append(Bytes& bytes, T value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof value);
}

float value_at(ElementType type, const Bytes& bytes, std::size_t index) {
  if (type == ElementType::kFloat) return element<float>(bytes, index);
  const auto bits = element<std::uint16_t>(bytes, index);
  return type == ElementType::kHalf ? half_to_float(bits) : bfloat16_to_float(bits);
}

void append_as(ElementType type, Bytes& bytes, float value) {
  if (type == ElementType::kFloat) return append(bytes, value);
  append(bytes, type == ElementType::kHalf ? float_to_half(value) : float_to_bfloat16(value));
}

// Of a weight: most are small, a few of no use.
float random_value(Random& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kBad[] = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), 70000, -65520, 0};
  if (pick(random, 0, 499) == 0) return kBad[pick(random, 0, std::size(kBad) - 1)];
  return std::uniform_real_distribution<float>(-3, 3)(random);
}

bool is_int8(const Wish& wish) {
  return wish.kind == Kind::kInt8 || wish.kind == Kind::kTransposed;
}

Bytes random_tensor(const Wish& wish, Random& random) {
  if (wish.kind == Kind::kAsStored) return random_bytes(wish.rows * wish.columns, random());
  Bytes bytes;
  for (std::size_t i = 0; i < wish.rows * wish.columns; ++i) {
    append_as(wish.stored, bytes, random_value(random));
  }
  return bytes;
}

// A byte for each of these rows: 1 where one holds something that is not finite.
Bytes marks_of(const Bytes& halves, std::size_t columns) {
  Bytes marks(halves.size() / 2 / columns, kUntouched);
  for (std::size_t i = 0; i < halves.size() / 2; ++i) {
    if (!std::isfinite(value_at(ElementType::kHalf, halves, i))) marks[i / columns] = std::byte{1};
  }
  return marks;
}

// Through the model's dtype to fp16, transposed if asked for.
Bytes halves_of(const Wish& wish, const Bytes& stored) {
  const bool transposed = wish.kind == Kind::kTransposed;
  const auto [rows, columns] = std::pair(wish.rows, wish.columns);
  Bytes halves;
  for (std::size_t i = 0; i < rows * columns; ++i) {
    const std::size_t at = transposed ? i % rows * columns + i / rows : i;
    const float value = value_at(wish.stored, stored, at);
    const bool rounds = wish.dtype == ElementType::kBFloat16;
    append(halves, float_to_half(rounds ? bfloat16_to_float(float_to_bfloat16(value)) : value));
  }
  return halves;
}

std::vector<Bytes> quantized(const Wish& wish, const Bytes& stored) {
  const Bytes halves = halves_of(wish, stored);
  const std::size_t rows = wish.kind == Kind::kTransposed ? wish.columns : wish.rows;
  const std::size_t columns = halves.size() / 2 / rows;
  Bytes codes(rows * columns), scales(rows * sizeof(float));
  fake_cuda::quantize_rows(halves.data(), codes.data(), scales.data(), static_cast<int>(rows),
                           static_cast<int>(columns));
  return {codes, scales, marks_of(halves, columns)};
}

std::vector<Bytes> converted(const Wish& wish, const Bytes& stored) {
  Bytes values, mark(1, kUntouched);
  for (std::size_t i = 0; i < wish.rows * wish.columns; ++i) {
    const float value = value_at(wish.stored, stored, i);
    append_as(wish.dtype, values, value);
    const float result = value_at(wish.dtype, values, i);
    if (std::isinf(result) && !std::isinf(value)) mark[0] = std::byte{1};
  }
  if (wish.dtype != ElementType::kHalf) return {values};
  return {values, mark};
}

std::vector<Bytes> expected(const Wish& wish, const Bytes& stored) {
  if (wish.kind == Kind::kAsStored) return {stored};
  return is_int8(wish) ? quantized(wish, stored) : converted(wish, stored);
}

}  // namespace

Wish random_wish(Random& random, std::size_t row_bytes) {
  Wish wish{static_cast<Kind>(pick(random, 0, 3)),
            kTypes[pick(random, 0, 2)],
            kTypes[pick(random, 0, 2)],
            0,
            0,
            pick(random, 0, 3) == 0};
  if (wish.kind == Kind::kCast && wish.stored == wish.dtype) wish.dtype = ElementType::kHalf;
  wish.columns = pick(random, 1, row_bytes / size_of(wish.stored));
  wish.rows = pick(random, 1, std::max<std::size_t>(1, kMostElements / wish.columns));
  return wish;
}

std::vector<Wish> random_wishes(Random& random, std::size_t count, std::size_t row_bytes) {
  std::vector<Wish> wishes;
  for (std::size_t i = 0; i < count; ++i) wishes.push_back(random_wish(random, row_bytes));
  return wishes;
}

std::vector<Wish> every_wish(std::size_t rows, std::size_t columns) {
  std::vector<Wish> wishes = {{Kind::kAsStored, {}, {}, rows, columns},
                              {Kind::kAsStored, {}, {}, rows, columns, true}};
  for (const Kind kind : {Kind::kInt8, Kind::kTransposed, Kind::kCast}) {
    for (const ElementType stored : kTypes) {
      for (const ElementType dtype : kTypes) {
        if (kind == Kind::kCast && stored == dtype && dtype != ElementType::kHalf) continue;
        for (const bool landed : {false, true})
          wishes.push_back({kind, stored, dtype, rows, columns, landed});
      }
    }
  }
  return wishes;
}

Destination::Destination(Bytes expected)
    : expected_(std::move(expected)), memory_(expected_.size() + 2 * kGuard, kUntouched) {}

Address Destination::address() const {
  return reinterpret_cast<Address>(memory_.data() + kGuard);
}

bool Destination::came() const {
  const auto is_free = [](std::byte byte) { return byte == kUntouched; };
  return std::equal(expected_.begin(), expected_.end(), memory_.begin() + kGuard) &&
         std::all_of(memory_.begin(), memory_.begin() + kGuard, is_free) &&
         std::all_of(memory_.end() - kGuard, memory_.end(), is_free);
}

bool Destination::is_untouched() const {
  return std::ranges::all_of(memory_, [](std::byte byte) { return byte == kUntouched; });
}

Tensor::Tensor(const Wish& wish, Random& random) : wish_(wish), stored_(random_tensor(wish, random)) {
  for (Bytes& bytes : expected(wish, stored_)) to_.emplace_back(std::move(bytes));
}

Request Tensor::request(Engine& engine, std::uint32_t lane, StreamHandle stream) {
  Request request{range_, wish_.stored, wish_.rows, wish_.columns, {}, 0};
  if (is_int8(wish_)) {
    request.to = ToInt8{wish_.dtype == ElementType::kBFloat16, wish_.kind == Kind::kTransposed,
                        to_[0].address(), to_[1].address()};
  } else {
    const bool as_stored = wish_.kind == Kind::kAsStored;
    request.to = ToValues{as_stored ? std::nullopt : std::optional(wish_.dtype), to_[0].address()};
  }
  if (to_.size() != 1) request.marks = to_.back().address();
  if (!wish_.landed) return request;
  landed_.resize(stored_.size());
  const Read read{range_, reinterpret_cast<Address>(landed_.data())};
  request.from = Landed{engine.submit(lane, {&read, 1}, stream, true), read.to};
  return request;
}

bool Tensor::came() const {
  return std::ranges::all_of(to_, [](const Destination& to) { return to.came(); });
}

bool Tensor::is_untouched() const {
  return std::ranges::all_of(to_, [](const Destination& to) { return to.is_untouched(); });
}

Tensors::Tensors(const std::vector<Wish>& wishes, Random& random) {
  Bytes content;
  for (const Wish& wish : wishes) {
    Tensor& tensor = all_.emplace_back(wish, random);
    content.resize(content.size() + pick(random, 0, 9));
    tensor.lies_at({0, content.size(), tensor.stored().size()});
    content.insert(content.end(), tensor.stored().begin(), tensor.stored().end());
  }
  file_ = std::make_unique<TempFile>(content);
}

bool Tensors::came() const {
  return std::ranges::all_of(all_, [](const Tensor& tensor) { return tensor.came(); });
}

bool Tensors::are_untouched() const {
  return std::ranges::all_of(all_, [](const Tensor& tensor) { return tensor.is_untouched(); });
}

std::vector<Bytes> Tensors::destinations() const {
  std::vector<Bytes> memory;
  for (const Tensor& tensor : all_) {
    for (const Destination& to : tensor.destinations()) memory.push_back(to.memory());
  }
  return memory;
}

Gpus::Gpus(Tensors& tensors, Callers& with, std::size_t scratch_bytes, const EngineOptions& options,
           Quantizer quantizer, const Share& share)
    : callers(with), engine(options) {
  std::size_t elements = 0;
  for (const Tensor& tensor : tensors) {
    elements = std::max(elements, tensor.wish().rows * tensor.wish().columns);
  }
  engine.add_file(tensors.path());
  for (std::uint32_t lane = 0; lane < callers.size(); ++lane) {
    const auto scratch = reinterpret_cast<Address>(memory_.emplace_back(scratch_bytes).data());
    const auto transposed = reinterpret_cast<Address>(memory_.emplace_back(elements * 2).data());
    engine.add_device(std::make_unique<CudaDevice>(fake_driver(), static_cast<int>(lane)));
    consumers.emplace_back(
        engine, lane, ConsumerOptions{scratch, scratch_bytes, transposed, elements * 2, quantizer, share});
  }
}

Ticket Gpus::submit(std::uint32_t lane, std::span<Tensor* const> tensors, bool first) {
  std::vector<Request> requests;
  for (Tensor* tensor : tensors) requests.push_back(tensor->request(engine, lane, callers[lane].stream()));
  return consumers[lane].submit(requests, callers[lane].stream(), first);
}

Ticket Gpus::submit(std::uint32_t lane, Tensor& tensor) {
  Tensor* const one = &tensor;
  return submit(lane, std::span(&one, 1));
}

Ticket Gpus::submit(std::uint32_t lane, Tensors& tensors) {
  std::vector<Tensor*> all;
  for (Tensor& tensor : tensors) all.push_back(&tensor);
  return submit(lane, std::span<Tensor* const>(all));
}

Ticket Gpus::wait(std::uint32_t lane, Ticket ticket) {
  const std::optional<Ticket> ready = consumers[lane].wait(ticket, callers[lane].stream(), kPatience);
  const Unrefused assertion;
  REQUIRE_MESSAGE(ready.has_value(), "ticket " << ticket);
  return *ready;
}

void Gpus::synchronize() {
  for (Caller& caller : callers) caller.synchronize();
}

}  // namespace pyint8::testing
