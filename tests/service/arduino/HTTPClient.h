// What the sketch in docs/clients.md uses of Arduino's core for the ESP32, over plain sockets, so
// that it runs here as it stands there.
#pragma once

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <random>
#include <sstream>
#include <string>

enum { DEC = 10, HEX = 16 };

class String : public std::string {
 public:
  String(const char* text = "") : std::string(text) {}
  String(const std::string& text) : std::string(text) {}
  String(unsigned int number, unsigned char base = DEC) {
    std::ostringstream text;
    if (base == HEX) text << std::hex;
    text << number;
    assign(text.str());
  }
  long toInt() const { return std::atol(c_str()); }
};

inline uint32_t esp_random() {
  static std::random_device device;
  return device();
}

inline void delay(uint32_t milliseconds) { usleep(milliseconds * 1000); }

class HTTPClient {
 public:
  static std::string body;  // of the last answer

  void collectHeaders(const char* names[], size_t count) {
    for (size_t i = 0; i < count; i++) collected_[names[i]] = "";
  }

  bool begin(const String& url) {
    const size_t host = url.find("//") + 2, port = url.find(':', host), path = url.find('/', host);
    host_ = url.substr(host, port - host);
    port_ = url.substr(port + 1, path - port - 1);
    head_ = "POST " + url.substr(path) + " HTTP/1.1\r\nHost: " + host_ + "\r\nConnection: close\r\n";
    return true;
  }

  void addHeader(const String& name, const String& value) { head_ += name + ": " + value + "\r\n"; }

  int POST(const String& payload) {
    const int connection = connected();
    if (connection < 0) return -1;  // HTTPC_ERROR_CONNECTION_REFUSED
    const std::string request =
        head_ + "Content-Length: " + std::to_string(payload.size()) + "\r\n\r\n" + payload;
    const ssize_t sent = send(connection, request.data(), request.size(), MSG_NOSIGNAL);
    std::string answer;
    char piece[4096];
    for (ssize_t n; (n = recv(connection, piece, sizeof piece, 0)) > 0;) answer.append(piece, n);
    close(connection);
    const size_t end = answer.find("\r\n\r\n");
    if (sent < 0 || end == std::string::npos) return -5;  // HTTPC_ERROR_CONNECTION_LOST
    for (auto& [name, value] : collected_) {
      const size_t at = answer.find("\r\n" + name + ": ");
      if (at < end) {
        const size_t from = at + name.size() + 4;
        value = answer.substr(from, answer.find("\r\n", from) - from);
      }
    }
    body = answer.substr(end + 4);
    return std::atoi(answer.c_str() + answer.find(' '));
  }

  String header(const char* name) { return collected_[name]; }
  void end() {}

 private:
  int connected() const {
    addrinfo hints{}, *found;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(host_.c_str(), port_.c_str(), &hints, &found)) return -1;
    const int connection = socket(found->ai_family, found->ai_socktype, 0);
    const bool failed = connect(connection, found->ai_addr, found->ai_addrlen) < 0;
    freeaddrinfo(found);
    if (!failed) return connection;
    close(connection);
    return -1;
  }

  std::string host_, port_, head_;
  std::map<std::string, std::string> collected_;
};

inline std::string HTTPClient::body;
