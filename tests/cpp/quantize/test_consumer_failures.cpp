// What a consumer refuses, and what is left when something goes wrong: nothing.
#include <algorithm>
#include <array>
#include <atomic>
#include <filesystem>
#include <thread>

#include "consumer_support.hpp"
#include "driver_failures.hpp"
#include "memory.hpp"
#include "pread.hpp"

namespace pyint8::testing {
namespace {

// More than the slots hold: behind a gate, it does not come.
Wish endless() {
  return {Kind::kAsStored, {}, {}, 1, 40 * kSlot};
}

// How a wait ends, which must not be by its patience.
ErrorCode code_of_wait(Gpus& gpus, Ticket ticket) {
  const auto start = std::chrono::steady_clock::now();
  try {
    gpus.consumers[0].wait(ticket, gpus.callers[0].stream(), kPatience);
  } catch (const Error& error) {
    CHECK(std::chrono::steady_clock::now() - start < kPatience / 2);
    return error.code();
  }
  FAIL_CHECK("no error");
  return {};
}

Request request_of(Tensor& tensor, Gpus& gpus) {
  return tensor.request(gpus.engine, 0, gpus.callers[0].stream());
}

// A whole load in little: two GPUs, every kind of request, some submitted while others are under way, an end.
class ConsumerLoad final : public Load {
 public:
  explicit ConsumerLoad(bool timeline) : timeline_(timeline) {}

  void run() override {
    EngineOptions options = kOptions;
    options.timeline = timeline_;
    Gpus gpus(tensors_, callers_, kLeast, options);
    for (std::uint32_t i = 0; i < 8; ++i) gpus.submit(i % 2, tensors_[i]);
    for (const Ticket ticket : {0, 1, 2}) {
      for (const std::uint32_t gpu : {0, 1}) gpus.wait(gpu, ticket);
    }
    gpus.submit(1, tensors_[8]);
    gpus.wait(0, 3);
    gpus.wait(1, 4);
    gpus.engine.close();
    for (Consumer& consumer : gpus.consumers) consumer.close();
  }
  void synchronize() override {
    for (Caller& caller : callers_) caller.synchronize();
  }
  bool arrived() const override { return tensors_.came(); }

 private:
  const bool timeline_;
  Random random_{7};
  Tensors tensors_{{{Kind::kInt8, ElementType::kBFloat16, ElementType::kBFloat16, 9, 21},
                    {Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 9, 21, true},
                    {Kind::kTransposed, ElementType::kFloat, ElementType::kBFloat16, 9, 21},
                    {Kind::kTransposed, ElementType::kHalf, ElementType::kHalf, 9, 21, true},
                    {Kind::kCast, ElementType::kFloat, ElementType::kHalf, 9, 21},
                    {Kind::kCast, ElementType::kHalf, ElementType::kFloat, 9, 21, true},
                    {Kind::kAsStored, {}, {}, 1, 3 * kSlot},
                    {Kind::kAsStored, {}, {}, 1, 3 * kSlot, true},
                    {Kind::kInt8, ElementType::kFloat, ElementType::kHalf, 40, 33}},
                   random_};
  Callers callers_{2};
};

}  // namespace

TEST_CASE("a driver that fails at any call gives an error, and nothing is left, nothing hangs") {
  for (const bool timeline : {false, true}) {
    CHECK(fail_each_call([&] { return std::make_unique<ConsumerLoad>(timeline); }) > 50);
  }
}

TEST_CASE("memory that is refused at any allocation is an error, and nothing is left, nothing hangs") {
  for (const bool timeline : {false, true}) {
    CHECK(refuse_each_allocation([&] { return std::make_unique<ConsumerLoad>(timeline); }) > 10);
  }
}

TEST_CASE("a consumer that a driver's error has stopped closes without another one") {
  const Accounts accounts;
  Random random(8);
  const Wish row{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 1, 21};
  Tensors tensors({row, row}, random);
  Callers callers(1);
  EngineOptions options = kOptions;
  options.timeline = true;
  Gpus gpus(tensors, callers, kLeast, options);
  Gate gate(callers[0]);  // so that the times of the first are still to be taken
  fake_cuda_fail_after("cuLaunchKernel", 2, 719);
  gpus.submit(0, tensors);
  CHECK(code_of_wait(gpus, 1) == ErrorCode::kDriver);
  gate.open();
  gpus.synchronize();
  gpus.engine.close();
  fake_cuda_fail_after("cuEventElapsedTime", 1, 719);
  CHECK_NOTHROW(gpus.consumers[0].close());
  fake_cuda_fail_after("cuEventElapsedTime", 0, 0);
}

TEST_CASE("where one request is refused, none of those with it is taken") {
  const Accounts accounts;
  Random random(1);
  Tensors tensors(every_wish(3, 8), random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  std::array<Request, 2> requests = {request_of(tensors[0], gpus), request_of(tensors[1], gpus)};
  requests[1].rows = 0;
  const Error error = error_of([&] { gpus.consumers[0].submit(requests, callers[0].stream()); });
  CHECK(error.code() == ErrorCode::kInvalidArgument);
  CHECK(gpus.submit(0, tensors) == 0);  // and all is well
  gpus.wait(0, tensors.size() - 1);
  gpus.synchronize();
  CHECK(tensors.came());
}

TEST_CASE("a ticket that there is not, and scratch that cannot be cut") {
  const Accounts accounts;
  Random random(2);
  Tensors tensors({{Kind::kCast, ElementType::kFloat, ElementType::kHalf, 3, 8}}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  CHECK(code_of_wait(gpus, 0) == ErrorCode::kInvalidArgument);
  const Error error = error_of([&] { Consumer(gpus.engine, 0, {0, kLeast - 1, 0, 0, nullptr}); });
  CHECK(error.code() == ErrorCode::kInvalidArgument);
  CHECK(error.message() == "scratch of 2047 bytes cannot be cut into bands");
  CHECK(error_of([&] { Consumer(gpus.engine, 1, {0, kLeast, 0, 0, nullptr}); }).message() ==
        "there is no lane 1");
}

TEST_CASE("a thread that is not started") {
  const Accounts accounts;
  Random random(3);
  Tensors tensors({endless()}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  constexpr int kMany = 100;
  // The driver's stream may come first, where its threads are seen.
  threads_left = kMany;
  Consumer(gpus.engine, 0, {0, kLeast, 0, 0, nullptr}).close();
  threads_left = kMany - threads_left - 1;
  std::optional<Error> error;
  try {
    Consumer(gpus.engine, 0, {0, kLeast, 0, 0, nullptr});
  } catch (const Error& refused) {
    error = refused;
  }
  threads_left = -1;
  REQUIRE(error.has_value());
  CHECK(error->code() == ErrorCode::kIo);
  CHECK(error->system_errno() == EAGAIN);
}

TEST_CASE("a consumer of a process that forked belongs to that process") {
  const Accounts accounts;
  Random random(3);
  Tensors tensors({endless()}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  const Ticket ticket = gpus.submit(0, tensors);
  CHECK(exit_code_of_child([&] {
          if (error_code([&] { gpus.wait(0, ticket); }) != ErrorCode::kCancelled) return 1;
          if (error_code([&] { gpus.submit(0, tensors); }) != ErrorCode::kCancelled) return 2;
          if (error_code([&] { gpus.consumers[0].done(); }) != ErrorCode::kCancelled) return 3;
          gpus.consumers[0].close();
          return 0;
        }) == 0);
  gpus.wait(0, ticket);
  gpus.synchronize();
  CHECK(tensors.came());
}

TEST_CASE("a build without kernels has no consumer") {
  const Accounts accounts;
  Random random(3);
  Tensors tensors({endless()}, random);
  Callers callers(1);
  const OnlyKernelImages none({});
  const Error error = error_of([&] { Gpus(tensors, callers, kLeast, kOptions); });
  CHECK(error.message() == "this build has no GPU kernels");
}

TEST_CASE("a file that ends too early is the error of every wait, and of what is submitted later") {
  const Accounts accounts;
  Random random(4);
  Tensors tensors(std::vector<Wish>(30, {Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 9, 99}),
                  random);
  std::filesystem::resize_file(tensors.path(), 20 * 9 * 99 * 2);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  gpus.submit(0, tensors);
  for (const Ticket ticket : {29, 29, 0}) {
    const Error error = error_of([&] { gpus.consumers[0].wait(ticket, callers[0].stream(), kPatience); });
    CHECK(error.code() == ErrorCode::kTruncated);
    CHECK(error.path() == tensors.path());
  }
  CHECK(gpus.consumers[0].done() < 30);
  CHECK(error_of([&] { gpus.submit(0, tensors[0]); }).code() == ErrorCode::kTruncated);
  gpus.engine.close();
  gpus.consumers[0].close();
  CHECK(code_of_wait(gpus, 0) == ErrorCode::kTruncated);
}

TEST_CASE("an error of a submission wakes those who wait for earlier ones") {
  const Accounts accounts;
  Random random(5);
  Tensors tensors({endless(), {Kind::kCast, ElementType::kFloat, ElementType::kHalf, 3, 8}}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  Gate gate(callers[0]);
  gpus.submit(0, tensors[0]);
  std::jthread waiting([&] { CHECK(code_of_wait(gpus, 0) == ErrorCode::kInvalidArgument); });
  soon();
  Request request = request_of(tensors[1], gpus);
  std::get<Range>(request.from).file = 7;
  const Error error = error_of([&] { gpus.consumers[0].submit({&request, 1}, callers[0].stream()); });
  CHECK(error.message() == "there is no file 7");
  waiting.join();
  CHECK(error_of([&] { gpus.submit(0, tensors[1]); }).message() == "there is no file 7");
  std::jthread closing([&] { gpus.engine.close(); });
  soon();
  CHECK(code_of_wait(gpus, 0) == ErrorCode::kInvalidArgument);  // the first error, not what came of it
  gate.open();
}

TEST_CASE("after an error nothing more is begun") {
  const Accounts accounts;
  Random random(11);
  Tensors tensors({endless(), {Kind::kInt8, ElementType::kFloat, ElementType::kHalf, 200, 60}}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  Gate gate(callers[0]);
  gpus.submit(0, tensors[0]);
  std::array<Request, 2> requests = {request_of(tensors[1], gpus), request_of(tensors[1], gpus)};
  std::get<Range>(requests[0].from).file = 7;  // planned for, but never read
  CHECK(error_of([&] { gpus.consumers[0].submit(requests, callers[0].stream()); }).message() ==
        "there is no file 7");
  gate.open();
  soon();
  gpus.engine.close();
  gpus.consumers[0].close();
  CHECK(tensors[1].is_untouched());
}

TEST_CASE("closing waits for the kernels, even if asking for it fails once") {
  const Accounts accounts;
  Random random(12);
  Tensors tensors({{Kind::kInt8, ElementType::kFloat, ElementType::kHalf, 3, 8}}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  Gate gate(callers[0]);
  gpus.wait(0, gpus.submit(0, tensors));
  const std::int64_t calls = fake_cuda_calls("cuCtxPushCurrent_v2");
  fake_cuda_fail_after("cuCtxPushCurrent_v2", 1, 719);
  std::jthread opener([&] {
    while (fake_cuda_calls("cuCtxPushCurrent_v2") == calls) soon();  // else the gate's own call would fail
    gate.open();
  });
  CHECK(error_of([&] { gpus.consumers[0].close(); }).code() == ErrorCode::kDriver);
  CHECK(tensors.came());
}

TEST_CASE("an engine that is closed first cancels its consumers") {
  const Accounts accounts;
  Random random(6);
  Tensors tensors({endless(), {Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 30, 99}}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  Gate gate(callers[0]);
  gpus.submit(0, tensors);
  std::jthread closing([&] { gpus.engine.close(); });
  CHECK(code_of_wait(gpus, 0) == ErrorCode::kCancelled);
  CHECK(code_of_wait(gpus, 1) == ErrorCode::kCancelled);
  gate.open();
  closing.join();
  gpus.consumers[0].close();
  CHECK(error_of([&] { gpus.submit(0, tensors[1]); }).code() == ErrorCode::kCancelled);
}

TEST_CASE("closing cancels a wait that is blocked, from whatever thread, and as often as one likes") {
  const Accounts accounts;
  Random random(7);
  Tensors tensors({endless()}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  const std::size_t threads = running_threads();
  Gate gate(callers[0]);
  gpus.submit(0, tensors);
  std::vector<std::jthread> closing;
  for (int i = 0; i < 3; ++i) {
    closing.emplace_back([&] {
      soon();
      gpus.consumers[0].close();
    });
  }
  CHECK(code_of_wait(gpus, 0) == ErrorCode::kCancelled);
  gate.open();
  closing.clear();
  gpus.consumers[0].close();
  CHECK(threads_become(threads - 1));
  CHECK(code_of_wait(gpus, 0) == ErrorCode::kCancelled);
  CHECK(error_of([&] { gpus.submit(0, tensors); }).code() == ErrorCode::kCancelled);
}

TEST_CASE("after engine and consumer are closed, busy or not, nothing is written any more") {
  Random random(8);
  for (int round = 0; round < 20; ++round) {
    const Accounts accounts;
    Tensors tensors(random_wishes(random, 60, kScratchAlignment), random);
    Callers callers(2);
    Gpus gpus(tensors, callers, kLeast, kOptions);
    for (std::size_t i = 0; i < tensors.size(); ++i) gpus.submit(i % 2, tensors[i]);
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 5));
    gpus.engine.close();
    for (Consumer& consumer : gpus.consumers) consumer.close();
    const std::vector<Bytes> after = tensors.destinations();
    soon();
    CHECK(after == tensors.destinations());
  }
}

TEST_CASE("a consumer, and its engine, may go without being closed, and leave no thread") {
  Random random(9);
  const std::size_t threads = running_threads();
  for (int round = 0; round < 10; ++round) {
    const Accounts accounts;
    Tensors tensors(random_wishes(random, 60, kScratchAlignment), random);
    Callers callers(1);
    {
      Gpus gpus(tensors, callers, kLeast, kOptions);
      gpus.submit(0, tensors);
      if (round % 2 == 1) gpus.wait(0, round);
    }
  }
  CHECK(threads_become(threads));
}

TEST_CASE("callers may submit, wait and close from threads of their own") {
  Random random(10);
  for (int round = 0; round < 20; ++round) {
    const Accounts accounts;
    std::atomic<int> wrong = 0;
    Tensors tensors(random_wishes(random, 60, kScratchAlignment), random);
    Callers callers(2);
    Gpus gpus(tensors, callers, kLeast, kOptions);
    std::vector<std::jthread> threads;
    for (std::size_t part = 0; part < 4; ++part) {  // two for each GPU
      threads.emplace_back([&, part, gpu = static_cast<std::uint32_t>(part % 2)] {
        try {
          for (std::size_t i = part; i < tensors.size(); i += 4) {
            if (!gpus.consumers[gpu].wait(gpus.submit(gpu, tensors[i]), callers[gpu].stream(), kPatience))
              ++wrong;
            callers[gpu].then([&, i] { wrong += !tensors[i].came(); });
          }
        } catch (const Error& error) {
          wrong += error.code() != ErrorCode::kCancelled;
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(round));
    if (round % 2 == 0) gpus.engine.close();
    for (Consumer& consumer : gpus.consumers) consumer.close();
    threads.clear();
    gpus.engine.close();
    gpus.synchronize();
    CHECK(wrong == 0);
  }
}

}  // namespace pyint8::testing
