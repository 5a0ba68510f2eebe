// A file that is read while its storage fails, gives little at a time, and others cut and write it: right
// bytes at the right place and nothing beside them, or an error that is true.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "input.hpp"
#include "pread.hpp"
#include "storage/open_files.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kMost = 5 * kDirectAlignment;
constexpr std::byte kUntouched{0x5a};
constexpr int kFailures[] = {EINTR, EIO, ESTALE, EAGAIN, EINVAL, ENOMEM, EBADF, ETIMEDOUT};

// Memory of which only a part may be written.
class Room {
 public:
  Room(std::size_t skipped, std::size_t capacity)
      : memory_(2 * kDirectAlignment + capacity, kUntouched), skipped_(skipped), capacity_(capacity) {}
  std::byte* data() { return first() + skipped_; }
  void require_untouched_about() {
    for (std::byte& byte : memory_) {
      const bool is_inside = &byte >= data() && &byte < data() + capacity_;
      require(is_inside || byte == kUntouched, "nothing beside the room is written");
    }
  }

 private:
  std::byte* first() {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    return memory_.data() + (kDirectAlignment - at % kDirectAlignment) % kDirectAlignment;
  }

  Bytes memory_;
  std::size_t skipped_, capacity_;
};

// What is in the file, and what has happened to it.
struct Truth {
  explicit Truth(Bytes bytes) : content(std::move(bytes)), opened_with(content.size()) {}
  Bytes content;
  const std::size_t opened_with;  // bytes
  bool has_changed = false;       // since it was opened
};

struct Wanted {
  std::size_t needed, capacity;
  std::uint64_t offset;
};

Wanted wanted_from(Input& input) {
  const std::size_t unit = input.once_in(2) ? kDirectAlignment : 1;
  const std::size_t capacity = unit * input.pick(1, unit == 1 ? 9000 : 3);
  const std::uint64_t far = input.number<std::uint64_t>();
  const std::uint64_t offset = input.once_in(9) ? far : unit * (far % (unit == 1 ? kMost : 6));
  return {capacity - input.pick(0, std::min<std::size_t>(capacity - 1, 5000)), capacity, offset};
}

void judge(const Error& error, const Wanted& wanted, const Truth& truth, const std::string& path) {
  require(error.path() == path, "the error names the file");
  const bool ends_before =
      wanted.offset > truth.content.size() || wanted.needed > truth.content.size() - wanted.offset;
  const bool is_beyond_counting = wanted.offset > static_cast<std::uint64_t>(INT64_MAX) - wanted.capacity;
  // Within one tick of the clock, a file that is cut and grows again looks as it did.
  const bool looks_unchanged = !truth.has_changed || truth.content.size() == truth.opened_with;
  switch (error.code()) {
    case ErrorCode::kTruncated:
      return require(ends_before && looks_unchanged, "it ends there, and always did");
    case ErrorCode::kChanged:
      return require(truth.has_changed, "it has changed");
    case ErrorCode::kIo:
      return require(is_beyond_counting || error.system_errno() == read_failure, "the system did say that");
    default:
      require(false, "the error is of files");
  }
}

void read(const Source& file, Input& input, const Truth& truth, const std::string& path) {
  const Wanted wanted = wanted_from(input);
  Room room(input.once_in(3) ? input.pick(0, 4095) : 0, wanted.capacity);
  most_at_once = input.once_in(3) ? input.pick(1, 3000) : kMost;
  read_failure = input.among(kFailures);
  reads_left = input.once_in(3) ? static_cast<int>(input.pick(0, 5)) : -1;
  try {
    file.read_at(room.data(), wanted.needed, wanted.capacity, wanted.offset);
    require(wanted.offset + wanted.needed <= truth.content.size(), "no bytes are made up");
    require(std::memcmp(room.data(), truth.content.data() + wanted.offset, wanted.needed) == 0,
            "they are the file's");
  } catch (const Error& error) {
    judge(error, wanted, truth, path);
  }
  reads_left = -1;
  room.require_untouched_about();
}

void cut(Truth& truth, Input& input, const std::string& path) {
  const std::size_t size = input.pick(0, kMost);
  if (size == truth.content.size()) return;
  require(::truncate(path.c_str(), static_cast<off_t>(size)) == 0, "the test can cut its file");
  truth.has_changed = true;
  truth.content.resize(size);
}

// In place, at another time.
void overwrite(Truth& truth, Input& input, const std::string& path) {
  if (truth.content.empty()) return;
  const std::size_t at = input.pick(0, truth.content.size() - 1);
  truth.content[at] = ~truth.content[at];
  const int file = ::open(path.c_str(), O_WRONLY);
  require(::pwrite(file, &truth.content[at], 1, static_cast<off_t>(at)) == 1, "the test can write its file");
  const timespec times[2] = {{1, 0}, {1, 0}};
  ::futimens(file, times);
  ::close(file);
  truth.has_changed = true;
}

void look(const Source& file, const Truth& truth) {
  const auto code = error_code([&] { file.require_unchanged(); });
  if (truth.has_changed) require(code == ErrorCode::kChanged || !code, "a change is told as one");
  if (!truth.has_changed) require(!code, "no change is told where there was none");
}

}  // namespace

void fuzz(Input& input) {
  Truth truth(random_bytes(input.pick(0, kMost), 1));
  const TempFile file(truth.content);
  cached_pages = input.pick(0, 6);
  OpenFiles files(1);
  const auto source = files.open(file.path(), input.once_in(2), std::nullopt);
  const auto other = files.open(file.path(), false, std::nullopt);
  while (!input.empty()) {
    const Source& one = input.once_in(3) ? *other : *source;
    switch (input.pick(0, 5)) {
      case 0:
        cut(truth, input, file.path());
        break;
      case 1:
        overwrite(truth, input, file.path());
        break;
      case 2:
        look(one, truth);
        break;
      default:
        read(one, input, truth, file.path());
    }
  }
}

}  // namespace pyint8::testing
