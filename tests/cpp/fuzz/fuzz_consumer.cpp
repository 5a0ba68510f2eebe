// A consumer with whatever scratch and requests, some of which cannot be, while storage and driver fail:
// codes, scales, marks and values are a plain loop's, byte for byte, or there is a reason.
#include <limits>
#include <set>

#include "consumer_support.hpp"
#include "judge.hpp"

namespace pyint8::testing {
namespace {

constexpr ElementType kTypes[] = {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat};

Wish wish_from(Input& input) {
  Wish wish{static_cast<Kind>(input.pick(0, 3)),
            input.among(kTypes),
            input.among(kTypes),
            input.pick(1, 40),
            input.pick(1, 80),
            input.once_in(4)};
  if (wish.kind == Kind::kCast && wish.stored == wish.dtype) wish.dtype = ElementType::kHalf;
  return wish;
}

std::vector<Wish> wishes_from(Input& input) {
  std::vector<Wish> wishes(input.pick(1, 8));
  for (Wish& wish : wishes) wish = wish_from(input);
  return wishes;
}

// Makes a request one that cannot be.
void spoil(Request& request, Input& input) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  auto* range = std::get_if<Range>(&request.from);
  switch (input.pick(0, range == nullptr ? 2 : 6)) {
    case 0:
      request.rows = 0;
      return;
    case 1:
      request.columns = 0;
      return;
    case 2:
      request.columns = kMost / 2 + input.pick(0, 9);
      request.rows = 3;
      return;
    case 3:
      request.rows += input.pick(1, 9);
      return;
    case 4:
      range->nbytes += input.pick(1, 9);
      return;
    case 5:
      range->nbytes -= 1;
      return;
    default:
      range->nbytes = kMost;
  }
}

class Run {
 public:
  explicit Run(Input& input) : input_(input), tensors_(wishes_from(input), random_) {}

  void operator()() {
    const std::size_t scratch = input_.once_in(2) ? kLeast : input_.pick(0, 64 << 10);
    EngineOptions options = kOptions;
    options.timeline = input_.once_in(4);
    Trouble trouble(input_);
    trouble_ = &trouble;
    if (scratch < kLeast) trouble.allow(ErrorCode::kInvalidArgument);
    trouble.passes([&] {
      Gpus gpus(tensors_, callers_, scratch, options);
      require(scratch >= kLeast, "scratch that cannot be cut is refused");
      room_ = scratch / 8 / kScratchAlignment * kScratchAlignment;
      use(gpus);
      trouble.passes([&] { gpus.engine.close(); });
      for (Consumer& consumer : gpus.consumers) trouble.passes([&] { consumer.close(); });
    });
    fake_cuda_fail_after("cuStreamSynchronize", 0, 0);  // if it has not come yet, let it not be the callers'
    for (Caller& caller : callers_) caller.synchronize();
    for (const std::size_t each : arrived_) require(tensors_[each].came(), "the bytes are a plain loop's");
  }

 private:
  void use(Gpus& gpus) {
    for (std::size_t i = 0; i < tensors_.size(); ++i) submit(gpus, i);
    for (const auto& [index, ticket] : ordered_) wait(gpus, index, ticket);
  }

  void submit(Gpus& gpus, std::size_t index) {
    const StreamHandle stream = callers_[0].stream();
    Request request;
    if (!trouble_->passes([&] { request = tensors_[index].request(gpus.engine, 0, stream); })) return;
    if (input_.once_in(6)) {
      spoil(request, input_);
      const auto code = error_code([&] { gpus.consumers[0].submit({&request, 1}, stream); });
      require(code == ErrorCode::kInvalidArgument, "what cannot be is refused");
      return;
    }
    if (!has_room(tensors_[index].wish())) trouble_->allow(ErrorCode::kInvalidArgument);
    const bool taken = trouble_->passes([&] {
      ordered_.emplace_back(index, gpus.consumers[0].submit({&request, 1}, stream, index % 3 == 0));
    });
    require(!taken || has_room(tensors_[index].wish()), "a row that does not fit is refused");
  }

  bool has_room(const Wish& wish) const {
    return wish.kind == Kind::kAsStored || wish.columns * size_of(wish.stored) <= room_;
  }

  void wait(Gpus& gpus, std::size_t index, Ticket ticket) {
    const bool came = trouble_->passes([&] {
      require(gpus.consumers[0].wait(ticket, callers_[0].stream(), kPatience).has_value(), "it comes");
    });
    if (came) arrived_.push_back(index);
  }

  Input& input_;
  Random random_{1};
  Tensors tensors_;
  Callers callers_{1};
  Trouble* trouble_ = nullptr;
  std::size_t room_ = 0;  // of a row
  std::vector<std::pair<std::size_t, Ticket>> ordered_;
  std::vector<std::size_t> arrived_;
};

}  // namespace

void fuzz(Input& input) {
  leaving_nothing<Run>(input);
}

}  // namespace pyint8::testing
