// What the fake driver knows: its devices and everything alive on them.
#pragma once

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "device/cuda_api.hpp"
#include "fake_cuda_order.hpp"
#include "fake_cuda_stream.hpp"

#define RETURN_IF(condition, error) \
  if (condition) return error
#define BEGIN(entry_point) \
  Call call(entry_point);  \
  RETURN_IF(call.result != 0, call.result)
#define BEGIN_IN_CONTEXT(entry_point) \
  BEGIN(entry_point);                 \
  RETURN_IF(call.context == nullptr, kInvalidContext)

namespace fake_cuda {
using namespace pyint8;

enum : CuResult {
  kSuccess = 0,
  kInvalidValue = 1,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kNoBinary = 209,
  kInvalidPtx = 218,
  kInvalidHandle = 400,
  kNotFound = 500,
  kLaunchFailed = 719,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kPeerAccessNotEnabled = 705,
};

struct Context {
  int retains = 0;
  std::unique_ptr<Stream> legacy;  // the default stream, which our non-blocking streams do not wait for
};

struct Event {
  const Context* context;
  std::shared_ptr<Moment> last;  // null until recorded
  Clock before;                  // what comes before it
  bool is_timed = false;
};

struct Kernel;

struct Function {
  const Kernel* kernel;
  std::shared_ptr<std::atomic<int>> running;  // kernels of the module
};

struct Module {
  const Context* context;
  std::shared_ptr<std::atomic<int>> running = std::make_shared<std::atomic<int>>(0);
  std::map<std::string, Function> functions = {};  // that were asked for
};

struct Registration {
  std::size_t nbytes;
  std::atomic<int> readers{0};
};

struct Failure {
  int calls_left;
  CuResult result;
};

inline unsigned from_environment(const char* name, unsigned otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : static_cast<unsigned>(std::atoi(value));
}

struct Driver {
  std::mutex mutex;  // guards all that follows; the streams' threads never take it
  std::vector<Context> devices = std::vector<Context>(from_environment("FAKE_CUDA_DEVICES", 4));
  const unsigned max_delay_us = from_environment("FAKE_CUDA_DELAY_US", 200);
  std::uint32_t streams_made = 0;
  std::map<CuStream, std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Stream>> destroyed;  // still running empty
  std::map<CuEvent, std::unique_ptr<Event>> events;
  std::uintptr_t modules_made = 0;
  std::map<CuModule, Module> modules;
  std::map<const std::byte*, std::shared_ptr<Registration>> registered;
  std::map<const std::byte*, std::pair<std::size_t, const Context*>> memory;  // that programs allocated here
  std::set<std::pair<const Context*, const Context*>> peers;  // of the first to the second's memory
  std::pair<CuDevicePtr, std::uint64_t> hidden;               // memory that no other device has access to
  std::int64_t pageable_copies = 0;
  std::int64_t violations = 0;
  Order order;
  std::map<std::string, std::int64_t> calls;
  std::map<std::string, Failure> failures;

  std::unique_ptr<Stream> make_stream(const Context* context) {
    return std::make_unique<Stream>(context, ++streams_made, max_delay_us);
  }

  // Puts work that touches memory on a stream.
  void put(Stream& stream, const std::vector<Access>& accesses, std::function<void()> work) {
    violations += order.put(stream.number(), accesses);
    stream.push(std::move(work));
  }

  // With a context goes all that lives in it, under its owner's feet.
  void destroy(const Context* context) {
    for (auto& [handle, stream] : streams) {
      if (stream->context() == context) destroyed.push_back(std::move(stream));
    }
    violations += std::erase_if(streams, [](const auto& entry) { return entry.second == nullptr; });
    violations += std::erase_if(events, [&](const auto& entry) { return entry.second->context == context; });
    violations += std::erase_if(modules, [&](const auto& entry) { return entry.second.context == context; });
    violations += std::erase_if(memory, [&](const auto& entry) { return entry.second.second == context; });
    violations += std::erase_if(peers, [&](const auto& pair) { return pair.first == context; });
  }
};

inline Driver& driver() {
  static Driver instance;
  return instance;
}

inline thread_local std::vector<Context*> context_stack;

// Holds the driver for the length of one call, and knows whether a test wants it to fail.
class Call {
 public:
  explicit Call(const char* entry_point) : lock_(driver().mutex) {
    ++driver().calls[entry_point];
    const auto failure = driver().failures.find(entry_point);
    if (failure == driver().failures.end() || --failure->second.calls_left > 0) return;
    result = failure->second.result;
    driver().failures.erase(failure);
  }
  // Before blocking, and after: others must be able to call.
  void unlock() { lock_.unlock(); }
  void lock() { lock_.lock(); }

  CuResult result = kSuccess;
  Context* const context = context_stack.empty() ? nullptr : context_stack.back();

 private:
  std::unique_lock<std::mutex> lock_;
};

inline Stream* find_stream(CuStream handle, Context* context) {
  if (handle != nullptr) {
    const auto found = driver().streams.find(handle);
    return found == driver().streams.end() ? nullptr : found->second.get();
  }
  if (context->legacy == nullptr) context->legacy = driver().make_stream(context);
  return context->legacy.get();
}

inline Event* find_event(CuEvent handle) {
  const auto found = driver().events.find(handle);
  return found == driver().events.end() ? nullptr : found->second.get();
}

// The registration that holds all of [from, from + nbytes), or null.
inline std::shared_ptr<Registration> registration_of(const void* from, std::size_t nbytes) {
  const auto* begin = static_cast<const std::byte*>(from);
  auto after = driver().registered.upper_bound(begin);
  if (after == driver().registered.begin()) return nullptr;
  const auto& [base, registration] = *--after;
  return begin + nbytes <= base + registration->nbytes ? registration : nullptr;
}

}  // namespace fake_cuda
