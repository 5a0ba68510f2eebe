#include "storage/open_files.hpp"

#include <dirent.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "error.hpp"

namespace pyint8 {
namespace {

std::size_t open_descriptors() {
  // Not std::filesystem's, which ends the process where memory is refused.
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir("/proc/self/fd"), &::closedir);
  std::size_t count = 0;
  while (folder != nullptr && ::readdir(folder.get()) != nullptr) ++count;
  return count;
}

}  // namespace

std::size_t descriptors_to_take(std::size_t most) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return most;
  const std::size_t open = open_descriptors();
  const std::size_t left = limit.rlim_cur > open ? limit.rlim_cur - open : 0;
  return std::clamp(left / 4, std::size_t{1}, most);
}

class OpenFiles::Entry final : public Source {
 public:
  Entry(OpenFiles& files, std::string path, bool direct, const std::optional<FileStamp>& expected)
      : files_(files), path_(std::move(path)), direct_(direct), stamp_(expected) {
    stamp_ = files_.lease(*this)->stamp();
  }
  ~Entry() override {
    const std::lock_guard lock(files_.mutex_);
    files_.open_.remove(this);
  }
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;

  void read_at(std::byte* out, std::size_t needed, std::size_t capacity,
               std::uint64_t offset) const override {
    files_.lease(*this)->read_at(out, needed, capacity, offset);
  }
  void require_unchanged() const override { files_.lease(*this)->require_unchanged(); }

 private:
  friend class OpenFiles;
  OpenFiles& files_;
  const std::string path_;
  const bool direct_;
  std::optional<FileStamp> stamp_;
  mutable Lease file_;  // guarded by the lock of `files_`; null while it is closed
};

std::unique_ptr<Source> OpenFiles::open(std::string path, bool direct,
                                        const std::optional<FileStamp>& expected) {
  return std::make_unique<Entry>(*this, std::move(path), direct, expected);
}

OpenFiles::Lease OpenFiles::lease(const Entry& entry) {
  std::unique_lock lock(mutex_);
  if (entry.file_ == nullptr) {
    lock.unlock();  // opening may take long on a network
    Lease opened = open_again(entry);
    lock.lock();
    if (entry.file_ == nullptr) {  // no other thread was faster
      open_.push_front(&entry);    // first: it may throw
      entry.file_ = std::move(opened);
    }
  }
  open_.splice(open_.begin(), open_, std::ranges::find(open_, &entry));
  const Lease leased = entry.file_;
  close_until(most_);
  return leased;
}

OpenFiles::Lease OpenFiles::open_again(const Entry& entry) {
  const auto open = [&] { return std::make_shared<const File>(entry.path_, entry.direct_, entry.stamp_); };
  try {
    return open();
  } catch (const Error& error) {
    if (error.system_errno() != EMFILE && error.system_errno() != ENFILE) throw;
  }
  {
    const std::lock_guard lock(mutex_);
    close_until(0);
  }
  return open();
}

void OpenFiles::close_until(std::size_t most) {
  for (auto at = open_.end(); at != open_.begin() && open_.size() > most;) {
    --at;
    if ((*at)->file_.use_count() > 1) continue;  // leases are given out with the lock held
    (*at)->file_.reset();
    at = open_.erase(at);
  }
}

}  // namespace pyint8
