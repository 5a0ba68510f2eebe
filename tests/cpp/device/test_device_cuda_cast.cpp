#include <algorithm>
#include <array>

#include "cuda_support.hpp"

extern "C" void cint8_vector_quant(const void*, void*, void*, float, int, int, std::uintptr_t);

namespace pyint8::testing {
namespace {

Address address_of(const void* data) {
  return reinterpret_cast<Address>(data);
}

// Random bits, cast on the device and by the CPU's road, `skew` bytes off the widest alignment.
struct Values {
  Values(ElementType type, ElementType to_type, bool through_bfloat16, std::size_t count, std::size_t skew)
      : source(random_bytes(count * size_of(type) + skew, 7)),
        target(count * size_of(to_type) + skew),
        marks(count / 10 + 1),
        expected(target),
        expected_marks(marks),
        job{address_of(source.data()) + skew,
            type,
            through_bfloat16,
            count,
            address_of(target.data()) + skew,
            to_type,
            to_type == ElementType::kHalf ? address_of(marks.data()) : 0,
            10} {
    CastJob on_cpu = job;
    on_cpu.to = address_of(expected.data()) + skew;
    if (on_cpu.marks_at != 0) on_cpu.marks_at = address_of(expected_marks.data());
    pyint8::cast(on_cpu);
  }
  bool is_cast() const { return target == expected && marks == expected_marks; }

  Bytes source, target, marks, expected, expected_marks;
  CastJob job;
};

}  // namespace

TEST_CASE("values are cast on the stream of the caller, behind what is there") {
  const Accounts accounts;
  const Values values(ElementType::kFloat, ElementType::kHalf, false, 100, 0);
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  {
    const Gate gate(caller);
    device.cast(values.job, caller.stream());
    CHECK(!values.is_cast());
  }
  caller.synchronize();
  CHECK(values.is_cast());
}

TEST_CASE("the device's casts are the CPU's") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  constexpr std::array kTypes = {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat};
  for (const ElementType from : kTypes) {
    for (const ElementType to : kTypes) {
      for (const bool through_bfloat16 : {false, true}) {
        if ((from == to && to != ElementType::kHalf) || (through_bfloat16 && to != ElementType::kHalf))
          continue;
        for (const std::size_t count : {1, 8, 2047, 2048, 2049, 50000}) {
          for (const std::size_t skew : {0, 4}) {
            const Values values(from, to, through_bfloat16, count, skew);
            device.cast(values.job, caller.stream());
            caller.synchronize();
            REQUIRE(values.is_cast());
          }
        }
      }
    }
  }
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 1);
}

TEST_CASE("no values launch nothing; a cast that there is not is refused before the driver sees it") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  device.cast({0, ElementType::kFloat, false, 0, 0, ElementType::kHalf}, 0);
  const auto same = [&] { device.cast({0, ElementType::kFloat, false, 1, 0, ElementType::kFloat}, 0); };
  CHECK(error_of(same).code() == ErrorCode::kInvalidArgument);
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 0);
}

TEST_CASE("kernels can be prepared, and a device that has none says so then") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  device.prepare_kernels();
  device.prepare_kernels();
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 1);
  CudaDevice other(fake_driver(), 1);
  const OnlyKernelImages none({});
  CHECK(error_of([&] { other.prepare_kernels(); }).message() == "this build has no GPU kernels");
}

TEST_CASE("bytes are copied within the device, behind what is there") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  const Bytes source = random_bytes(1000, 1);
  Bytes target(1000);
  {
    const Gate gate(caller);
    device.copy_on_device(address_of(target.data()), address_of(source.data()), 1000, caller.stream());
    CHECK(target != source);
  }
  caller.synchronize();
  CHECK(target == source);
}

TEST_CASE("the quantizer is called with the device's context current, at threshold 0") {
  const Accounts accounts;
  Caller caller(2);
  CudaDevice device(fake_driver(), 2);
  const auto stream = device.make_stream();
  const std::array<std::uint16_t, 4> half = {0x3c00, 0xbc00, 0x0000, 0x4000};  // 1, -1 / 0, 2
  std::array<std::int8_t, 4> codes{};
  std::array<float, 2> scales{};
  device.quantize(cint8_vector_quant,
                  {address_of(half.data()), address_of(codes.data()), address_of(scales.data()), 2, 2},
                  stream->handle());
  stream->synchronize();
  CHECK(codes == std::array<std::int8_t, 4>{127, -127, 0, 127});
  CHECK(scales == std::array<float, 2>{1, 2});
}

}  // namespace pyint8::testing
