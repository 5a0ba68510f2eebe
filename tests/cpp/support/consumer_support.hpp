// Tensors that know what should become of them, and GPUs with a consumer each.
#pragma once

#include <deque>
#include <memory>
#include <thread>

#include "cuda_support.hpp"
#include "engine_support.hpp"
#include "quantize/consumer.hpp"

namespace pyint8::testing {

inline constexpr std::size_t kSlot = 8192;
inline constexpr std::size_t kLeast = 8 * kScratchAlignment;  // scratch: bands of one alignment each
inline constexpr EngineOptions kOptions = {.threads = 2, .slots_per_thread = 2, .slot_bytes = kSlot};

inline void soon() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

enum class Kind { kInt8, kTransposed, kCast, kAsStored };

// What is in a file, and what it is to become.
struct Wish {
  Kind kind;
  ElementType stored;
  ElementType dtype;  // the model's, or that of the cast
  std::size_t rows, columns;
  bool landed = false;  // it was asked for before
};

// One of all that there is, with rows of at most so many bytes.
Wish random_wish(Random& random, std::size_t row_bytes);
// Each kind, of each dtype, to each dtype, landed and not.
std::vector<Wish> every_wish(std::size_t rows, std::size_t columns);

// Memory with more about it, which nothing may touch.
class Destination {
 public:
  explicit Destination(Bytes expected);
  Address address() const;
  const Bytes& memory() const { return memory_; }
  bool came() const;
  bool is_untouched() const;

 private:
  Bytes expected_, memory_;
};

// One tensor and its destinations. They must outlive whatever writes there.
class Tensor {
 public:
  Tensor(const Wish& wish, Random& random);

  const Wish& wish() const { return wish_; }
  const Bytes& stored() const { return stored_; }
  // Asks the engine for the bytes first if they are to have landed.
  Request request(Engine& engine, std::uint32_t lane, StreamHandle stream);
  void lies_at(const Range& range) { range_ = range; }
  // Whether all is as a plain loop makes it, byte for byte, and nothing else was touched.
  bool came() const;
  bool is_untouched() const;
  const std::deque<Destination>& destinations() const { return to_; }

 private:
  Wish wish_;
  Bytes stored_, landed_;
  Range range_{};
  std::deque<Destination> to_;  // codes, scales and marks; or values, and a mark where there may be one
};

// Tensors in a file, one behind the other with gaps: the first file of an engine.
class Tensors {
 public:
  Tensors(const std::vector<Wish>& wishes, Random& random);

  Tensor& operator[](std::size_t index) { return all_[index]; }
  std::size_t size() const { return all_.size(); }
  auto begin() { return all_.begin(); }
  auto end() { return all_.end(); }
  const std::string& path() const { return file_->path(); }
  bool came() const;
  bool are_untouched() const;
  // What is in them now.
  std::vector<Bytes> destinations() const;

 private:
  std::deque<Tensor> all_;
  std::unique_ptr<TempFile> file_;
};

std::vector<Wish> random_wishes(Random& random, std::size_t count, std::size_t row_bytes);

// Of GPUs from number 0 on, one each.
class Callers : public std::deque<Caller> {
 public:
  explicit Callers(int count) {
    for (int gpu = 0; gpu < count; ++gpu) emplace_back(gpu);
  }
};

// An engine with a consumer for each caller's GPU. Outlived by the tensors and by the callers, as by torch.
class Gpus {
 public:
  Gpus(Tensors& tensors, Callers& with, std::size_t scratch_bytes, const EngineOptions& options,
       Quantizer quantizer = cint8_vector_quant, const Share& share = {});

  Ticket submit(std::uint32_t lane, std::span<Tensor* const> tensors, bool first = false);
  Ticket submit(std::uint32_t lane, Tensor& tensor);
  // All of them.
  Ticket submit(std::uint32_t lane, Tensors& tensors);
  // Fails the test if it does not come.
  Ticket wait(std::uint32_t lane, Ticket ticket);
  void synchronize();

 private:
  std::deque<Bytes> memory_;  // first, so that it outlives what uses it

 public:
  Callers& callers;
  Engine engine;
  std::deque<Consumer> consumers;
};

}  // namespace pyint8::testing
