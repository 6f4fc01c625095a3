// Memory of each rank of a host that all of them read and write.
#pragma once

#include <cstdint>
#include <vector>

namespace dlrm {

constexpr int64_t kLine = 64;  // bytes of a cache line

class HostMemory {
 public:
  // Makes this rank's, zeros, a file in memory; the other ranks ask for as much.
  //
  // Throws std::runtime_error where there is no memory.
  HostMemory(int rank, int world, int64_t bytes);
  HostMemory(const HostMemory&) = delete;
  ~HostMemory();

  // This process, its file, and a number that no other file has: what other ranks need for `open`.
  struct Address {
    int64_t process = -1, file = -1, token = 0;
  };
  Address address() const;

  // Maps the other ranks'.
  //
  // Throws std::runtime_error where the system refuses that, a process's number means another one here, or a rank made
  // memory of another size.
  void open(const std::vector<Address>& addresses);
  // What is mapped stays so. Nobody else can open this rank's any more, nor ask whether it is there.
  void close_files();

  // A rank's `bytes`, at a multiple of kLine.
  char* of(int rank) const;
  // Whether the rank's process is no more, or has closed its file.
  bool has_ended(int rank) const;

 private:
  char* map(int file) const;

  const int rank_;
  const int64_t file_bytes_;
  std::vector<int> files_;
  std::vector<char*> maps_;
};

}  // namespace dlrm
