// Casts, preparing kernels and handing the stream to bitsandbytes' quantizer, over the fake driver.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <latch>
#include <thread>

#include "cuda_support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kGuard = 8;  // elements of the target that nothing may touch
constexpr std::uint8_t kUnmarked = 0x5a;

Address address_of(const void* data) {
  return reinterpret_cast<Address>(data);
}

void soon() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

struct Pair {
  ElementType from;
  ElementType to;
  bool through_bfloat16 = false;
};

constexpr std::array<Pair, 10> kPairs = {{
    {ElementType::kHalf, ElementType::kHalf},
    {ElementType::kHalf, ElementType::kHalf, true},
    {ElementType::kHalf, ElementType::kBFloat16},
    {ElementType::kHalf, ElementType::kFloat},
    {ElementType::kBFloat16, ElementType::kHalf},
    {ElementType::kBFloat16, ElementType::kHalf, true},
    {ElementType::kBFloat16, ElementType::kFloat},
    {ElementType::kFloat, ElementType::kHalf},
    {ElementType::kFloat, ElementType::kHalf, true},
    {ElementType::kFloat, ElementType::kBFloat16},
}};

// Values of random bits, cast on the device and by the CPU's road. Both begin `shift` elements into their
// memory, so that wide loads may not be allowed.
class Values {
 public:
  Values(const Pair& pair, std::size_t elements, std::size_t shift, Marks marks = Marks::kNotFinite)
      : elements_(elements),
        shift_(shift),
        pair_(pair),
        source_(random_bytes((shift + elements) * size_of(pair.from), elements + shift)),
        target_((shift + elements + kGuard) * size_of(pair.to), std::byte{0xcd}),
        expected_(target_),
        marks_(elements / kPerMark + 2, kUnmarked),
        expected_marks_(marks_),
        wanted_(marks) {
    cast(job(source_, expected_, expected_marks_));
  }

  // Reads from the source itself, or from a copy of it that may come later.
  CastJob on_device() { return job(source_, target_, marks_); }
  CastJob on_device(const Bytes& arriving) { return job(arriving, target_, marks_); }
  const Bytes& source() const { return source_; }

  // The two differ at most in the bits of a NaN; nothing else was touched.
  bool are_cast() const {
    if (marks_ != expected_marks_) return false;
    for (std::size_t at = 0; at < target_.size(); at += size_of(pair_.to)) {
      if (std::memcmp(&target_[at], &expected_[at], size_of(pair_.to)) != 0 && !are_nan(at)) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kPerMark = 100;

  CastJob job(const Bytes& from, Bytes& to, std::vector<std::uint8_t>& marks) const {
    const bool has_marks = pair_.to == ElementType::kHalf;
    return {address_of(from.data() + shift_ * size_of(pair_.from)),
            pair_.from,
            pair_.through_bfloat16,
            elements_,
            address_of(to.data() + shift_ * size_of(pair_.to)),
            pair_.to,
            has_marks ? address_of(marks.data()) : 0,
            kPerMark,
            wanted_};
  }

  bool are_nan(std::size_t at) const {
    const auto is_nan = [&](const Bytes& bytes) {
      std::uint32_t bits = 0;  // of fp32, or those of 16 bits above
      std::memcpy(reinterpret_cast<std::byte*>(&bits) + 4 - size_of(pair_.to), &bytes[at], size_of(pair_.to));
      return (bits & 0x7fffffff) > (pair_.to == ElementType::kHalf ? 0x7c000000u : 0x7f800000u);
    };
    return is_nan(target_) && is_nan(expected_);
  }

  std::size_t elements_, shift_;
  Pair pair_;
  Bytes source_, target_, expected_;
  std::vector<std::uint8_t> marks_, expected_marks_;
  Marks wanted_;
};

// A good job that nobody waits for.
Values small() {
  return {{ElementType::kFloat, ElementType::kHalf}, 9, 0};
}

}  // namespace

TEST_CASE("values are cast as on the CPU, whatever their dtypes, number and addresses") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  for (const Pair& pair : kPairs) {
    for (const std::size_t elements : {1, 7, 8, 9, 255, 2047, 2048, 2049, 10001}) {
      for (const std::size_t shift : {0, 1, 3}) {
        for (const Marks marks : {Marks::kNotFinite, Marks::kOverflow}) {
          CAPTURE(elements);
          CAPTURE(shift);
          Values values(pair, elements, shift, marks);
          device.cast(values.on_device(), caller.stream());
          caller.synchronize();
          REQUIRE(values.are_cast());
        }
      }
    }
  }
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 1);
}

TEST_CASE("a cast comes behind what is on the stream, and does not wait for it") {
  const Accounts accounts;
  Values values({ElementType::kFloat, ElementType::kHalf}, 5000, 1);
  Bytes arriving(values.source().size());
  Caller caller(1);
  CudaDevice device(fake_driver(), 1);
  Gate gate(caller);
  caller.then([&] { std::ranges::copy(values.source(), arriving.begin()); });
  device.cast(values.on_device(arriving), caller.stream());
  CHECK_FALSE(values.are_cast());
  gate.open();
  caller.synchronize();
  CHECK(values.are_cast());
}

TEST_CASE("fp16 is looked at in place") {
  const Accounts accounts;
  std::vector<std::uint16_t> halves(300, 0x3c00);
  halves[150] = 0x7c00;
  const std::vector<std::uint16_t> before = halves;
  std::vector<std::uint8_t> marks(3, kUnmarked);
  const Address at = address_of(halves.data());
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  device.cast({at, ElementType::kHalf, false, 300, at, ElementType::kHalf, address_of(marks.data()), 100},
              caller.stream());
  caller.synchronize();
  CHECK(halves == before);
  CHECK(marks == std::vector<std::uint8_t>{kUnmarked, 1, kUnmarked});
}

TEST_CASE("no elements launch nothing; a bad job is refused before the driver sees it") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  CastJob job{0, ElementType::kFloat, false, 0, 0, ElementType::kHalf};
  device.cast(job, 0);
  job.elements = 1;
  job.to_type = ElementType::kFloat;
  CHECK(error_of([&] { device.cast(job, 0); }).code() == ErrorCode::kInvalidArgument);
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 0);
  CHECK(fake_cuda_calls("cuLaunchKernel") == 0);
}

TEST_CASE("a cast that the driver refuses is an error, and may succeed the next time") {
  const Accounts accounts;
  const std::array<KernelImage, 1> machine_code = {{{80, "machine code 80"}}};
  const OnlyKernelImages only(machine_code);  // PTX would be tried next
  Values values = small();
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  for (const std::string call :
       {"cuModuleLoadDataEx", "cuModuleGetFunction", "cuEventCreate", "cuLaunchKernel", "cuEventRecord"}) {
    CAPTURE(call);
    fake_cuda_fail_after(call.c_str(), 1, 719);
    const Error error = error_of([&] { device.cast(values.on_device(), caller.stream()); });
    CHECK(error.code() == ErrorCode::kDriver);
    CHECK(contains(error.message(), call));
    CHECK(contains(error.message(), "CUDA_ERROR_LAUNCH_FAILED"));
  }
  device.cast(values.on_device(), caller.stream());
  caller.synchronize();
  CHECK(values.are_cast());
}

TEST_CASE("prepared kernels need not be loaded later") {
  const Accounts accounts;
  Values values = small();
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  const std::array<KernelImage, 1> ptx = {{{0, "PTX"}}};
  {
    const OnlyKernelImages only(ptx);
    fake_cuda_fail_after("cuModuleLoadDataEx", 1, 218);
    const Error error = error_of([&] { device.prepare_kernels(); });
    CHECK(contains(error.message(), "cuModuleLoadDataEx the fake compiler's log: CUDA_ERROR_INVALID_PTX"));
  }
  device.prepare_kernels();
  CHECK(counters().modules == 1);
  CHECK(fake_cuda_calls("cuLaunchKernel") == 0);
  device.prepare_kernels();
  device.cast(values.on_device(), caller.stream());
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 2);  // the one that failed, and one for all
  caller.synchronize();
  CHECK(values.are_cast());
}

TEST_CASE("a build without kernels says so when they are prepared, and when it is to cast") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  const OnlyKernelImages none({});
  Values values = small();
  for (const Error& error :
       {error_of([&] { device.prepare_kernels(); }), error_of([&] { device.cast(values.on_device(), 0); })}) {
    CHECK(error.code() == ErrorCode::kDriver);
    CHECK(error.message() == "this build has no GPU kernels");
  }
}

TEST_CASE("a device that goes lets its kernels end first, on whatever stream") {
  const Accounts accounts;
  Values first = small(), second = small();
  Caller one(0), other(0);
  auto device = std::make_unique<CudaDevice>(fake_driver(), 0);
  Gate gate(one);
  device->cast(first.on_device(), one.stream());
  device->cast(second.on_device(), other.stream());
  std::jthread opener([&] {
    soon();
    gate.open();
  });
  device.reset();  // or the fake counts a violation
  one.synchronize();
  other.synchronize();
  CHECK(first.are_cast());
  CHECK(second.are_cast());
}

TEST_CASE("the fake sees a race between streams, whoever is first") {
  Accounts accounts;
  Values values = small();
  Caller caller(0), other(0);
  CudaDevice device(fake_driver(), 0);
  std::latch is_over(1);  // of which the driver knows nothing; in truth there must be no race
  device.cast(values.on_device(), caller.stream());
  caller.then([&] { is_over.count_down(); });
  CHECK(counters().violations == 0);
  other.then([&] { is_over.wait(); });
  device.cast(values.on_device(), other.stream());  // to the same place
  CHECK(counters().violations > 0);
  caller.synchronize();
  other.synchronize();
  const std::int64_t before = counters().violations;
  device.cast(values.on_device(), caller.stream());  // after all of that
  CHECK(counters().violations == before);
  accounts.ignore();
}

TEST_CASE("the quantizer puts its work on the stream, with the device's context current") {
  const Accounts accounts;
  std::vector<std::uint16_t> halves(6);
  std::vector<std::int8_t> codes(6);
  std::vector<float> scales(2);
  Caller caller(2);
  CudaDevice device(fake_driver(), 2);
  Gate gate(caller);
  caller.then([&] { halves[0] = 0x3c00, halves[1] = 0xc000; });
  device.quantize(cint8_vector_quant,
                  {address_of(halves.data()), address_of(codes.data()), address_of(scales.data()), 2, 3},
                  caller.stream());
  CHECK(fake_cuda_calls("cint8_vector_quant") == 1);
  CHECK(scales == std::vector<float>{0, 0});  // it is behind the gate
  gate.open();
  caller.synchronize();
  CHECK(codes == std::vector<std::int8_t>{64, -127, 0, 0, 0, 0});
  CHECK(scales == std::vector<float>{2, 0});
  CuContext current = nullptr;
  CHECK(fake_driver()->context_pop(&current) == 201);  // none is left
}

}  // namespace pyint8::testing
