// See host_memory.h.
#include "host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace dlrm {
namespace {

std::runtime_error system_error(const std::string& what) {
  return std::runtime_error(what + ": " + std::strerror(errno));
}

constexpr int64_t kHugePage = 2 << 20;
#if !defined(MADV_COLLAPSE)
constexpr int MADV_COLLAPSE = 25;  // glibc 2.37 names it
#endif

struct flock whole_file() {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return lock;
}

// Repeats a call that a signal interrupts: a run that is asked to save and end must not fail here.
template <class Call>
int unless_interrupted(Call call) {
  int result;
  do result = call();
  while (result != 0 && errno == EINTR);
  return result;
}

// The random number at the beginning of a file.
int64_t& token_of(char* map) { return *reinterpret_cast<int64_t*>(map); }

}  // namespace

HostMemory::HostMemory(int rank, int world, int64_t bytes)
    : rank_(rank), file_bytes_(kLine + bytes), files_(world, -1), maps_(world, nullptr) {
  const int file = memfd_create("dlrm", MFD_CLOEXEC);
  if (file < 0) throw system_error("memfd_create");
  files_[rank] = file;
  // The file gets its pages now: if there were none at first use, that would be a SIGBUS instead of an error. The lock
  // is this rank's sign of life: the kernel frees it when the process exits, and forked processes do not inherit it.
  struct flock lock = whole_file();
  if (unless_interrupted([&] { return ftruncate(file, file_bytes_); }) != 0 ||
      unless_interrupted([&] { return fallocate(file, 0, 0, file_bytes_); }) != 0 || fcntl(file, F_SETLK, &lock) != 0) {
    const auto error = system_error("a file in memory of " + std::to_string(file_bytes_) + " bytes");
    close(file);
    throw error;
  }
  try {
    maps_[rank] = map(file);
    if (getrandom(&token_of(maps_[rank]), sizeof(int64_t), 0) != sizeof(int64_t)) throw system_error("getrandom");
  } catch (...) {
    if (maps_[rank] != nullptr) munmap(maps_[rank], file_bytes_);
    close(file);
    throw;
  }
}

HostMemory::~HostMemory() {
  for (char* map : maps_) {
    if (map != nullptr) munmap(map, file_bytes_);
  }
  close_files();
}

void HostMemory::close_files() {
  for (int& file : files_) {
    if (file >= 0) close(std::exchange(file, -1));
  }
}

HostMemory::Address HostMemory::address() const { return {getpid(), files_[rank_], token_of(maps_[rank_])}; }

// Maps a file at a multiple of kHugePage, and in huge pages if the system can (Linux 6.1 or newer): neighbouring
// entries of a column of pooled rows lie about a page apart, and a CPU's TLB holds few small pages.
char* HostMemory::map(int file) const {
  void* room = mmap(nullptr, file_bytes_ + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) throw system_error("mmap");
  char* start = static_cast<char*>(room);
  char* memory = start + (-reinterpret_cast<uintptr_t>(start) & (kHugePage - 1));
  if (mmap(memory, file_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
    const auto error = system_error("mmap");
    munmap(room, file_bytes_ + kHugePage);
    throw error;
  }
  const int64_t page = sysconf(_SC_PAGESIZE);
  char* end = memory + (file_bytes_ + page - 1) / page * page;
  if (memory > start) munmap(start, memory - start);
  munmap(end, start + file_bytes_ + kHugePage - end);
  madvise(memory, file_bytes_, MADV_COLLAPSE);  // a wish: if it is refused, the pages stay small
  return memory;
}

void HostMemory::open(const std::vector<Address>& addresses) {
  for (int rank = 0; rank < static_cast<int>(files_.size()); ++rank) {
    if (rank == rank_) continue;
    const auto& [process, file, token] = addresses[rank];
    if (file < 0) throw std::runtime_error("another rank could not make or open its memory");
    const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(file);
    files_[rank] = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (files_[rank] < 0) throw system_error(path);
    const int64_t bytes = lseek(files_[rank], 0, SEEK_END);
    if (bytes >= kLine) maps_[rank] = map(files_[rank]);
    if (maps_[rank] == nullptr || token_of(maps_[rank]) != token) {
      throw std::runtime_error(path + " is another process's: ranks have process numbers of their own");
    }
    if (bytes != file_bytes_) {
      throw std::runtime_error("rank " + std::to_string(rank) + " asked for " + std::to_string(bytes - kLine) +
                               " bytes of memory, this rank for " + std::to_string(file_bytes_ - kLine));
    }
  }
}

char* HostMemory::of(int rank) const { return maps_[rank] == nullptr ? nullptr : maps_[rank] + kLine; }

bool HostMemory::has_ended(int rank) const {
  struct flock lock = whole_file();
  return fcntl(files_[rank], F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

}  // namespace dlrm
