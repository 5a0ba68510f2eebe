// Consumers of several ranks, each of which reads its part of every band: over the fake driver, in one
// process, whose memory is what the ranks gather through.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "consumer_support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kLeastShared = 64;
constexpr std::size_t kMostAgreed = 32;         // as the conductor's
constexpr std::size_t kParts = 12;              // of scratch
constexpr std::size_t kScratch = kParts << 12;  // bands of 4 KiB

// The same tensors on every rank, in files and memory of its own.
class Rank {
 public:
  Rank(std::uint32_t rank, std::uint32_t ranks, const std::vector<Wish>& wishes, std::uint32_t seed,
       std::size_t scratch)
      : random_(seed),
        tensors(wishes, random_),
        callers_(1),
        gpus(tensors, callers_, scratch, kOptions, cint8_vector_quant, {rank, ranks, kLeastShared}) {}

  Consumer& consumer() { return gpus.consumers[0]; }
  StreamHandle stream() { return callers_[0].stream(); }
  // The tensors up to this one, one by one, unless they were.
  void submit(std::size_t end) {
    for (; submitted_ < end; ++submitted_) gpus.submit(0, tensors[submitted_]);
  }

 private:
  std::size_t submitted_ = 0;
  Random random_;

 public:
  Tensors tensors;

 private:
  Callers callers_;

 public:
  Gpus gpus;
};

class Ranks {
 public:
  Ranks(std::uint32_t count, const std::vector<Wish>& wishes, std::uint32_t seed,
        std::size_t scratch = kScratch) {
    for (std::uint32_t rank = 0; rank < count; ++rank) all_.emplace_back(rank, count, wishes, seed, scratch);
  }

  // What all ranks list behind the bands that were agreed on before.
  std::vector<std::size_t> agree(std::size_t skipped) {
    std::vector<std::size_t> all = all_.front().consumer().sizes_ahead(skipped, kMostAgreed);
    for (Rank& rank : all_) {
      const std::vector<std::size_t> sizes = rank.consumer().sizes_ahead(skipped, kMostAgreed);
      all.resize(std::min(all.size(), sizes.size()));
      CHECK(std::equal(all.begin(), all.end(), sizes.begin()));
    }
    return all;
  }

  // Gathers the next `count` bands.
  void gather(std::size_t count) {
    std::vector<std::vector<Shared>> bands;
    for (Rank& rank : all_) {
      auto found = rank.consumer().await_parts(count, rank.stream(), kPatience);
      REQUIRE(found.has_value());
      bands.push_back(std::move(*found));
      rank.gpus.synchronize();
    }
    for (std::size_t i = 0; i < count; ++i) exchange(bands, i);
    for (Rank& rank : all_) rank.consumer().gathered(count, rank.stream());
  }

  auto begin() { return all_.begin(); }
  auto end() { return all_.end(); }
  Rank& operator[](std::size_t rank) { return all_[rank]; }

 private:
  static std::byte* at(const Shared& band) { return reinterpret_cast<std::byte*>(band.memory); }

  static void exchange(const std::vector<std::vector<Shared>>& bands, std::size_t i) {
    for (std::size_t from = 0; from < bands.size(); ++from) {
      const auto& [memory, nbytes, part] = bands[from][i];
      for (const auto& to : bands) {
        CHECK(to[i].nbytes == nbytes);
        CHECK(to[i].part == part);
        std::memmove(at(to[i]) + from * part, at(bands[from][i]) + from * part, part);
      }
    }
  }

  std::deque<Rank> all_;
};

Wish weight_of(std::size_t rows, std::size_t columns) {
  return {Kind::kInt8, ElementType::kHalf, ElementType::kHalf, rows, columns};
}

// Long rows of whole-read bands, and between them those that are gathered.
std::vector<Wish> mixed_wishes(Random& random, std::size_t band) {
  std::vector<Wish> wishes;
  for (int i = 0; i < 6; ++i) {
    wishes.insert(wishes.end(), pick(random, 0, 1) * pick(random, 0, 60), weight_of(1, pick(random, 1, 31)));
    for (std::size_t n = pick(random, 1, 3); n > 0; --n) {
      wishes.push_back(weight_of(pick(random, 1, 4), pick(random, 32, band / 2)));
    }
    if (pick(random, 0, 2) == 0) wishes.push_back({Kind::kAsStored, {}, {}, 1, pick(random, 1, 3 * band)});
  }
  return wishes;
}

// As the conductor cuts what was agreed on: a batch ends once it has half of what may be in scratch.
std::vector<std::size_t> batches_of(const std::vector<std::size_t>& sizes, std::size_t scratch) {
  const std::size_t most = (kParts - 1) * (scratch / kParts / kScratchAlignment * kScratchAlignment) / 2;
  std::vector<std::size_t> counts;
  std::size_t nbytes = most;
  for (const std::size_t size : sizes) {
    if (nbytes >= most) {
      counts.push_back(0);
      nbytes = 0;
    }
    ++counts.back();
    nbytes += size;
  }
  return counts;
}

bool has_more(Rank& rank) {
  return !rank.consumer().sizes_ahead(0, 1).empty();
}

}  // namespace

TEST_CASE("what ranks gather becomes on each what one alone would make of it") {
  Random random(1);
  for (const std::uint32_t count : {2U, 3U, 5U}) {
    CAPTURE(count);
    const Accounts accounts;
    std::vector<Wish> wishes = random_wishes(random, 60, kScratch / kParts);
    wishes.push_back({Kind::kTransposed, ElementType::kFloat, ElementType::kHalf, 300, 41});
    wishes.push_back({Kind::kAsStored, {}, {}, 1, 20'001});
    for (Wish& wish : wishes) wish.landed = false;
    Ranks ranks(count, wishes, count);
    std::vector<Ticket> firsts;
    for (Rank& rank : ranks) firsts.push_back(rank.gpus.submit(0, rank.tensors));
    while (has_more(ranks[0])) {
      const auto sizes = ranks[0].consumer().sizes_ahead(0, pick(random, 1, 2));
      for (Rank& rank : ranks) CHECK(rank.consumer().sizes_ahead(0, sizes.size()) == sizes);
      ranks.gather(sizes.size());
    }
    std::size_t all_bytes = 0;
    for (const Wish& wish : wishes) {
      const std::size_t size = wish.kind == Kind::kAsStored ? 1 : size_of(wish.stored);
      all_bytes += wish.rows * wish.columns * size;
    }
    for (Rank& rank : ranks) {
      CHECK(rank.gpus.wait(0, wishes.size() - 1) == wishes.size());
      rank.gpus.synchronize();
      CHECK(rank.tensors.came());
      CHECK(rank.gpus.engine.stats().bytes_delivered < all_bytes / count + all_bytes / 10);
      CHECK_FALSE(has_more(rank));
    }
  }
}

TEST_CASE("sizes ahead are those of the bands that are gathered, from any one on") {
  const Accounts accounts;
  Random random(2);
  const Wish weight{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 40, 1000};  // bands of 2 rows
  const Wish tiny{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 3, 5};
  const Wish landed{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 3, 1000, true};
  Ranks ranks(2, {weight, tiny, landed, weight}, 3);
  for (Rank& rank : ranks) rank.gpus.submit(0, rank.tensors);
  const std::vector<std::size_t> all(40, 4000);
  CHECK(ranks[0].consumer().sizes_ahead(0, 100) == all);
  CHECK(ranks[0].consumer().sizes_ahead(0, 7) == std::vector<std::size_t>(7, 4000));
  CHECK(ranks[0].consumer().sizes_ahead(38, 7) == std::vector<std::size_t>(2, 4000));
  CHECK(ranks[0].consumer().sizes_ahead(40, 7).empty());
  ranks.gather(2);
  CHECK(ranks[0].consumer().sizes_ahead(0, 100).size() == 38);
  for (int i = 0; i < 19; ++i) ranks.gather(2);
  for (Rank& rank : ranks) {
    rank.gpus.wait(0, 3);
    rank.gpus.synchronize();
    CHECK(rank.tensors.came());
  }
}

TEST_CASE("bands with more between them than has room in scratch beside them are not listed together") {
  const Accounts accounts;
  std::vector<Wish> wishes(200, weight_of(1, 20));  // that all read whole: more than scratch has room for
  wishes.insert(wishes.begin(), weight_of(1, 100));
  wishes.push_back(weight_of(1, 100));
  Ranks ranks(2, wishes, 6);
  for (Rank& rank : ranks) {
    rank.gpus.submit(0, rank.tensors);
    CHECK(rank.consumer().sizes_ahead(0, 32) == std::vector<std::size_t>{200});
    CHECK(rank.consumer().sizes_ahead(1, 32) == std::vector<std::size_t>{200});
    CHECK(rank.consumer().sizes_ahead(0, 0).empty());
  }
  ranks.gather(1);
  ranks.gather(1);
  for (Rank& rank : ranks) {
    rank.gpus.wait(0, wishes.size() - 1);
    rank.gpus.synchronize();
    CHECK(rank.tensors.came());
  }
}

TEST_CASE("whatever lies between bands that are gathered together, they come, on every rank") {
  for (std::uint32_t seed = 1; seed <= 40; ++seed) {
    CAPTURE(seed);
    const Accounts accounts;
    Random random(seed);
    const std::size_t scratch = kParts * kScratchAlignment * pick(random, 1, 8);
    const std::vector<Wish> wishes = mixed_wishes(random, scratch / kParts);
    Ranks ranks(2, wishes, seed, scratch);
    ranks[0].submit(pick(random, 0, wishes.size()));  // this one is behind
    ranks[1].submit(wishes.size());
    std::vector<std::size_t> agreed;
    do {
      const std::vector<std::size_t> next = ranks.agree(agreed.size());
      for (const std::size_t count : batches_of(agreed, scratch)) ranks.gather(count);
      agreed = next;
      ranks[0].submit(wishes.size());
    } while (!agreed.empty() || has_more(ranks[0]));
    for (Rank& rank : ranks) {
      rank.gpus.wait(0, wishes.size() - 1);
      rank.gpus.synchronize();
      CHECK(rank.tensors.came());
    }
  }
}

TEST_CASE("a band is made only once it was gathered, and there is a limit to waiting") {
  const Accounts accounts;
  Ranks ranks(2, {{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 2, 1000}}, 4);
  Rank& rank = ranks[0];
  const auto at_once = std::chrono::milliseconds(0);
  CHECK_FALSE(rank.consumer().await_parts(1, rank.stream(), at_once).has_value());
  CHECK_THROWS_AS(rank.consumer().gathered(1, rank.stream()), Error);
  for (Rank& each : ranks) each.gpus.submit(0, each.tensors);
  CHECK_FALSE(rank.consumer().await_parts(2, rank.stream(), std::chrono::milliseconds(30)).has_value());
  CHECK_FALSE(rank.consumer().wait(0, rank.stream(), std::chrono::milliseconds(30)).has_value());
  CHECK(rank.tensors.are_untouched());
  ranks.gather(1);
  for (Rank& each : ranks) {
    each.gpus.wait(0, 0);
    each.gpus.synchronize();
    CHECK(each.tensors.came());
  }
}

TEST_CASE("who waits for parts is told that the engine has failed, or was closed") {
  const Accounts accounts;
  Ranks ranks(2, {{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, 2000, 1000}}, 5);
  for (Rank& rank : ranks) rank.gpus.submit(0, rank.tensors);
  ranks.gather(2);
  Rank& rank = ranks[1];
  rank.gpus.engine.close();
  try {
    for (int i = 0; i < 2000; ++i) rank.consumer().await_parts(1, rank.stream(), kPatience);
    FAIL("nothing was thrown");
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kCancelled);
  }
}

}  // namespace pyint8::testing
