#include <memory>

#include "support.hpp"
#include "transfer/lane_queue.hpp"

namespace pyint8::testing {
namespace {

std::vector<int> take_all(LaneQueue<int>& queue) {
  std::vector<int> order;
  while (!queue.empty()) order.push_back(queue.pop());
  return order;
}

}  // namespace

TEST_CASE("a lane's jobs come in order") {
  LaneQueue<int> queue;
  CHECK(queue.empty());
  queue.push(0, {1, 2}, false);
  queue.push(0, {}, false);
  queue.push(0, {3}, false);
  CHECK(take_all(queue) == std::vector<int>{1, 2, 3});
}

TEST_CASE("lanes take turns, however large their submissions are") {
  LaneQueue<int> queue;
  queue.push(0, {1, 2, 3, 4, 5}, false);
  queue.push(2, {21, 22}, false);
  queue.push(1, {11, 12, 13}, false);
  CHECK(take_all(queue) == std::vector<int>{1, 11, 21, 2, 12, 22, 3, 13, 4, 5});
}

TEST_CASE("a lane whose device is slow waits while others have fewer jobs under way") {
  LaneQueue<int> queue;
  queue.push(0, {1, 2, 3, 4}, false);
  queue.push(1, {11, 12, 13, 14}, false);
  CHECK(queue.pop() == 1);
  for (const int job : {11, 12, 13, 14}) {
    CHECK(queue.pop() == job);
    queue.done(1);
  }
  CHECK(queue.pop() == 2);
  queue.push(1, {15}, false);
  CHECK(queue.pop() == 15);
}

TEST_CASE("urgent jobs come before their lane's others, in order") {
  LaneQueue<int> queue;
  queue.push(0, {1, 2}, false);
  queue.push(0, {3, 4}, true);
  queue.push(0, {5, 6}, true);
  queue.push(0, {7}, false);
  CHECK(queue.pop() == 3);
  queue.push(0, {8}, true);
  CHECK(take_all(queue) == std::vector<int>{4, 5, 6, 8, 1, 2, 7});
  queue.push(0, {9}, false);
  queue.push(0, {10}, true);
  CHECK(take_all(queue) == std::vector<int>{10, 9});
}

TEST_CASE("a lane's urgent jobs take no turn from the others") {
  LaneQueue<int> queue;
  queue.push(0, {1, 2, 3}, false);
  queue.push(1, {13}, false);
  queue.push(1, {11, 12}, true);
  CHECK(take_all(queue) == std::vector<int>{1, 11, 2, 12, 3, 13});
}

TEST_CASE("clearing destroys what waits, urgent or not") {
  const auto witness = std::make_shared<int>(0);
  LaneQueue<std::shared_ptr<int>> queue;
  queue.push(0, {witness, witness}, false);
  queue.push(3, {witness}, true);
  queue.clear();
  CHECK(queue.empty());
  queue.push(3, {nullptr}, false);
  queue.push(3, {witness}, true);
  CHECK(queue.pop() == witness);
  queue.clear();
  CHECK(witness.use_count() == 1);
}

}  // namespace pyint8::testing
