#include <functional>

#include "quantize/request.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

constexpr Room kRoom = {.band = 256, .transposed = 48};
constexpr std::size_t kMost = (std::size_t{1} << 31) - 1;  // that an int counts
constexpr Address kSomewhere = 4096;

// Of fp32, [3, 8], unless a test says otherwise.
Request weight() {
  return {Range{0, 0, 96}, ElementType::kFloat, 3, 8, ToInt8{false, false, kSomewhere, kSomewhere},
          kSomewhere};
}
Request transposed() {
  Request request = weight();
  std::get<ToInt8>(request.to).transposed = true;
  return request;
}
Request values(std::optional<ElementType> dtype) {
  Request request = weight();
  request.to = ToValues{dtype, kSomewhere};
  request.marks = 0;
  return request;
}
Request as_stored() {
  Request request = values(std::nullopt);
  request.columns = 32;  // bytes
  return request;
}

// With as many bytes as these elements are.
Request shaped(Request request, std::size_t rows, std::size_t columns) {
  const std::size_t element = stays_as_stored(request) ? 1 : size_of(request.stored);
  request.rows = rows;
  request.columns = columns;
  request.from = Range{0, 0, rows * columns * element};
  return request;
}

Request landed(Request request) {
  request.from = Landed{0, kSomewhere};
  return request;
}

void refused(const Request& request, const std::string& words) {
  CAPTURE(words);
  const Error error = error_of([&] { bands_of(request, kRoom); });
  CHECK(error.code() == ErrorCode::kInvalidArgument);
  CHECK_MESSAGE(contains(error.message(), words), error.message());
}

}  // namespace

TEST_CASE("rows are cut into bands by what they are as stored") {
  for (const Request& request : {weight(), values(ElementType::kHalf), landed(weight())}) {
    Request many = request;
    many.rows = 20;
    if (std::holds_alternative<Range>(many.from)) many = shaped(many, 20, 8);
    const std::vector<Band> bands = bands_of(many, kRoom);
    REQUIRE(bands.size() == 3);
    CHECK(bands[0].rows == 8);
    CHECK(bands[2].rows == 4);
    CHECK(bands[2].start == 512);
  }
  CHECK(bands_of(transposed(), kRoom).size() == 1);
  CHECK(bands_of(shaped(weight(), 2, 64), kRoom).size() == 2);  // a row may fill a band
}

TEST_CASE("what stays as stored is one band, however large, and of any dtype") {
  CHECK(bands_of(landed(as_stored()), kRoom).size() == 1);
  Request request = shaped(as_stored(), 1, std::size_t{1} << 40);
  request.stored = static_cast<ElementType>(7);
  const std::vector<Band> bands = bands_of(request, kRoom);
  REQUIRE(bands.size() == 1);
  CHECK(bands[0].rows == 1);
  CHECK(bands[0].nbytes == std::size_t{1} << 40);
  CHECK(stays_as_stored(request));
  CHECK_FALSE(stays_as_stored(values(ElementType::kHalf)));
  CHECK_FALSE(stays_as_stored(weight()));
  CHECK(is_transposed(transposed()));
  CHECK_FALSE(is_transposed(weight()));
  CHECK_FALSE(is_transposed(request));
}

TEST_CASE("a row that no band holds is refused") {
  for (const Request& request : {weight(), transposed(), values(ElementType::kHalf)}) {
    const Request wide = shaped(request, 1, 65);
    if (!is_transposed(request)) refused(wide, "a row of 260 bytes does not fit in a band of 256");
    refused(landed(shaped(request, 1, 4000)),
            is_transposed(request) ? "transposed weight" : "a row of 16000");
  }
  CHECK(error_of([] { bands_of(shaped(transposed(), 1, 65), {256, 1000}); }).message() ==
        "a row of 260 bytes does not fit in a band of 256");
}

TEST_CASE("a transposed weight is refused if its fp16 form does not fit in its memory") {
  CHECK(bands_of(transposed(), kRoom).size() == 1);  // 48 bytes
  refused(shaped(transposed(), 5, 5), "a transposed weight of 50 bytes does not fit in its memory of 48");
  CHECK_FALSE(bands_of(shaped(weight(), 5, 5), kRoom).empty());
}

TEST_CASE("empty tensors, and sizes that do not agree, are refused") {
  for (const Request& request :
       {weight(), transposed(), values(ElementType::kHalf), values(ElementType::kBFloat16), as_stored()}) {
    refused(shaped(request, 0, 8), "an empty tensor");
    refused(shaped(request, 3, 0), "an empty tensor");
    refused(shaped(request, kMost << 2, kMost << 2), "a tensor that is too large");
    Request other = request;
    ++std::get<Range>(other.from).nbytes;
    refused(other, "a range of 97 bytes for a tensor of 96");
  }
}

TEST_CASE("more rows or columns than bitsandbytes counts are refused") {
  for (const Request& request : {weight(), transposed()}) {
    refused(shaped(request, kMost + 1, 1), "a weight of 2147483648 x 1 has more rows or columns");
    refused(shaped(request, 1, kMost + 1), "a weight of 1 x 2147483648 has more rows or columns");
  }
  const Room large = {std::size_t{1} << 40, std::size_t{1} << 40};
  CHECK(bands_of(shaped(weight(), 1, kMost), large).size() == 1);
  CHECK(bands_of(shaped(values(ElementType::kHalf), kMost + 1, 1), large).size() == 1);  // are only cast
}

TEST_CASE("marks are given where something becomes fp16, and refused elsewhere") {
  for (const auto dtype : {std::optional(ElementType::kBFloat16), std::optional<ElementType>()}) {
    Request request = dtype ? values(dtype) : as_stored();
    request.marks = kSomewhere;
    refused(request, "only a cast to fp16 has marks");
  }
  Request request = values(ElementType::kHalf);
  request.marks = kSomewhere;
  CHECK(bands_of(request, kRoom).size() == 1);
}

TEST_CASE("casts that there are not, and unknown dtypes, are refused") {
  refused(values(ElementType::kFloat), "values that have the dtype are not cast");
  for (Request request : {weight(), transposed(), values(ElementType::kHalf)}) {
    request.stored = static_cast<ElementType>(7);
    request.from = Range{0, 0, 48};
    refused(request, "unknown element type 7");
  }
  refused(values(static_cast<ElementType>(7)), "unknown element type 7");
}

}  // namespace pyint8::testing
