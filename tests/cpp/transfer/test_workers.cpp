#include <atomic>
#include <cerrno>
#include <chrono>
#include <latch>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "pread.hpp"
#include "support.hpp"
#include "transfer/workers.hpp"

namespace pyint8::testing {
namespace {

void nothing() {}
void at_once(std::size_t) {}

std::vector<int> numbers(int count) {
  std::vector<int> jobs(static_cast<std::size_t>(count));
  std::iota(jobs.begin(), jobs.end(), 0);
  return jobs;
}

std::string words_of(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  }
  return "";
}

}  // namespace

TEST_CASE("every job is run once, whatever the threads") {
  for (const std::size_t threads : {1, 2, 8}) {
    std::vector<std::atomic<int>> runs(1000);
    std::latch all(1000);
    Workers<int> workers(threads, {at_once,
                                   [&](const int& job, std::size_t) {
                                     ++runs[static_cast<std::size_t>(job)];
                                     all.count_down();
                                   },
                                   nothing});
    workers.push(0, numbers(1000), false);
    all.wait();
    for (const auto& count : runs) REQUIRE(count == 1);
    CHECK(workers.error() == nullptr);
  }
}

TEST_CASE("where the operating system refuses threads, those there are do the work") {
  std::latch all(100);
  threads_left = 2;
  Workers<int> workers(8, {at_once, [&](const int&, std::size_t) { all.count_down(); }, nothing});
  threads_left = -1;
  CHECK(workers.size() == 2);
  workers.push(0, numbers(100), false);
  all.wait();
}

TEST_CASE("without any thread it is an error that says what to do") {
  threads_left = 0;
  const Error error = error_of([] { Workers<int>(8, {at_once, [](const int&, std::size_t) {}, nothing}); });
  threads_left = -1;
  CHECK(error.code() == ErrorCode::kIo);
  CHECK(error.system_errno() == EAGAIN);
  CHECK(contains(error.message(), "cannot start a thread (raise `ulimit -u`"));
}

TEST_CASE("jobs are begun in order, the first ones ahead of those that wait and in their own order") {
  std::vector<int> order;
  std::latch begun(1), go(1), all(7);
  Workers<int> workers(1, {at_once,
                           [&](const int& job, std::size_t) {
                             if (job == 0) {
                               begun.count_down();
                               go.wait();
                             }
                             order.push_back(job);
                             all.count_down();
                           },
                           nothing});
  workers.push(0, {0}, false);
  begun.wait();
  workers.push(0, {1, 2}, false);
  workers.push(0, {3, 4}, true);
  workers.push(0, {}, true);
  workers.push(0, {5}, false);
  workers.push(0, {6}, true);
  go.count_down();
  all.wait();
  workers.stop();
  CHECK(order == std::vector<int>{0, 3, 4, 6, 1, 2, 5});
}

TEST_CASE("the first error is kept, told once, and stops the rest") {
  std::atomic<int> runs = 0, told = 0;
  std::latch failed(1);
  Workers<int> workers(4, {at_once,
                           [&](const int& job, std::size_t) {
                             ++runs;
                             std::this_thread::sleep_for(std::chrono::milliseconds(1));
                             throw std::runtime_error("job " + std::to_string(job));
                           },
                           [&] {
                             ++told;
                             failed.count_down();
                           }});
  workers.push(0, numbers(1000), false);
  failed.wait();
  const std::exception_ptr error = workers.error();
  CHECK(contains(words_of(error), "job "));
  workers.push(0, numbers(1000), true);
  workers.stop();
  CHECK(workers.error() == error);
  CHECK(told == 1);
  CHECK(runs <= 4);
}

TEST_CASE("the error is there when the failure is told") {
  std::latch checked(1);
  bool there = false;
  Workers<int>* self = nullptr;
  Workers<int> workers(1, {at_once, [](const int&, std::size_t) { throw Error(ErrorCode::kIo, "words"); },
                           [&] {
                             there = self->error() != nullptr;
                             checked.count_down();
                           }});
  self = &workers;
  workers.push(0, {1}, false);
  checked.wait();
  CHECK(there);
  CHECK(error_of([&] { std::rethrow_exception(workers.error()); }).code() == ErrorCode::kIo);
}

TEST_CASE("an error that is no exception object is kept too") {
  std::latch failed(1);
  Workers<int> workers(1, {at_once, [](const int&, std::size_t) { throw 42; }, [&] { failed.count_down(); }});
  workers.push(0, {1}, false);
  failed.wait();
  CHECK_THROWS_AS(std::rethrow_exception(workers.error()), int);
}

TEST_CASE("stop lets the job under way end, drops the others, joins, and may be called again") {
  const std::size_t before = running_threads();
  std::atomic<int> ended = 0;
  std::latch begun(2);
  Workers<int> workers(2, {at_once,
                           [&](const int&, std::size_t) {
                             begun.count_down();
                             std::this_thread::sleep_for(std::chrono::milliseconds(20));
                             ++ended;
                           },
                           nothing});
  CHECK(threads_become(before + 2));
  workers.push(0, numbers(2), false);
  begun.wait();
  workers.push(0, numbers(100), false);
  workers.stop();
  CHECK(ended == 2);
  CHECK(threads_become(before));
  workers.stop();
  workers.push(0, numbers(5), false);  // into the void
  workers.stop();
  CHECK(ended == 2);
  CHECK(workers.error() == nullptr);
}

TEST_CASE("the destructor joins, idle or busy or failed") {
  const std::size_t before = running_threads();
  {
    Workers<int> idle(3, {at_once, [](const int&, std::size_t) {}, nothing});
  }
  CHECK(threads_become(before));
  {
    Workers<int> busy(
        3,
        {at_once, [](const int&, std::size_t) { std::this_thread::sleep_for(std::chrono::milliseconds(5)); },
         nothing});
    busy.push(0, numbers(100), false);
  }
  CHECK(threads_become(before));
  {
    Workers<int> failed(3, {at_once, [](const int&, std::size_t) { throw std::runtime_error(""); }, nothing});
    failed.push(0, numbers(100), false);
  }
  CHECK(threads_become(before));
}

TEST_CASE("jobs that wait are destroyed at the first error") {
  const auto witness = std::make_shared<int>(0);
  std::latch failed(1), go(1);
  Workers<std::shared_ptr<int>> workers(1, {at_once,
                                            [&](const auto&, std::size_t) {
                                              go.wait();
                                              throw std::runtime_error("");
                                            },
                                            [&] { failed.count_down(); }});
  workers.push(0, std::vector(50, witness), false);
  go.count_down();
  failed.wait();
  CHECK(witness.use_count() <= 2);  // the failed job itself may be on its way out
}

TEST_CASE("a worker that is not ready leaves jobs to the others, and takes none once stopped") {
  std::latch ready(1), all(100);
  std::atomic<int> by_the_slow = 0;
  Workers<int> workers(2, {[&](std::size_t worker) {
                             if (worker == 0) ready.wait();
                           },
                           [&](const int&, std::size_t worker) {
                             by_the_slow += worker == 0;
                             all.count_down();
                           },
                           nothing});
  workers.push(0, numbers(100), false);
  all.wait();
  CHECK(by_the_slow == 0);
  workers.push(0, numbers(1), false);
  std::thread stopping([&] { workers.stop(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  ready.count_down();
  stopping.join();
  CHECK(by_the_slow == 0);
}

TEST_CASE("an error while getting ready is a job's error") {
  std::latch failed(1);
  Workers<int> workers(1, {[](std::size_t) { throw std::runtime_error("not ready"); },
                           [](const int&, std::size_t) {}, [&] { failed.count_down(); }});
  workers.push(0, {1}, false);
  failed.wait();
  CHECK(words_of(workers.error()) == "not ready");
}

TEST_CASE("jobs are destroyed with the workers, run or not") {
  const auto witness = std::make_shared<int>(0);
  {
    Workers<std::shared_ptr<int>> workers(1, {at_once, [](const auto&, std::size_t) {}, nothing});
    workers.push(0, std::vector(50, witness), false);
    workers.stop();
    workers.push(0, std::vector(50, witness), false);
  }
  CHECK(witness.use_count() == 1);
}

}  // namespace pyint8::testing
