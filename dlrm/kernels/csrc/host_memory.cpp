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

std::runtime_error system_error(const std::string& what) { return std::runtime_error(what + ": " + std::strerror(errno)); }

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

// As often as a signal ends it: a run that is asked to save and end is to get there.
template <class Call>
int unless_interrupted(Call call) {
  int result;
  do result = call();
  while (result != 0 && errno == EINTR);
  return result;
}

int64_t& token_of(char* map) { return *reinterpret_cast<int64_t*>(map); }  // which a file begins with

}  // namespace

HostMemory::HostMemory(int rank, int world, int64_t bytes)
    : rank_(rank), file_bytes_(kLine + bytes), files_(world, -1), maps_(world, nullptr) {
  const int file = memfd_create("dlrm", MFD_CLOEXEC);
  if (file < 0) throw system_error("memfd_create");
  files_[rank] = file;
  // Allocated now: later there would be a SIGBUS in place of an error. The lock, which forked processes do not have, is this
  // rank's sign of life.
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

// At a multiple of kHugePage, and in huge pages where the system can (Linux 6.1 or newer): columns of pooled rows are a page
// apart, and the CPU remembers the addresses of so many only.
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
  madvise(memory, file_bytes_, MADV_COLLAPSE);  // or it stays as it is
  return memory;
}

void HostMemory::open(const std::vector<Address>& addresses) {
  for (int rank = 0; rank < static_cast<int>(files_.size()); ++rank) {
    if (rank == rank_) continue;
    const auto& [process, file, token] = addresses[rank];
    if (file < 0) throw std::runtime_error("another rank can't");
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
