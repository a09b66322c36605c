/* One connection to the agent: a Unix stream socket, never blocking, every
   step bounded by the caller's deadline.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

void kw_conn_init(struct kw_conn *c, int wake, uint8_t *secret) {
  c->fd = -1;
  c->wake = wake;
  c->seq = 0;
  c->secret = secret;
}

void kw_conn_close(struct kw_conn *c) {
  if (c->fd >= 0)
    close(c->fd);
  c->fd = -1;
}

static enum kw_class drop(struct kw_conn *c, struct kw_error *e, enum kw_class class, const char *what) {
  kw_conn_close(c);
  return kw_fail(e, class, "agent socket %s: %s", kw_settings.socket_path, what);
}

/* Waits until the socket is ready for events. */
static enum kw_class ready(struct kw_conn *c, short events, uint64_t deadline, struct kw_error *e) {
  for (;;) {
    uint64_t now = kw_now_ms();
    if (now >= deadline)
      return drop(c, e, KW_TIMEOUT, "no answer in time (keyward_timeout)");
    uint64_t left = deadline - now;
    struct pollfd p[2] = {{c->fd, events, 0}, {c->wake, POLLIN, 0}};
    int n = poll(p, 2, left > 60000 ? 60000 : (int)left);
    if (n < 0 && errno != EINTR)
      return drop(c, e, KW_TRANSPORT, strerror(errno));
    if (n > 0 && p[1].revents)
      return drop(c, e, KW_CANCELLED, "the server is shutting down");
    if (n > 0 && p[0].revents)
      return KW_OK;
  }
}

/* May only that account put a socket at path? */
static bool owns_directory(uid_t uid, const char *path) {
  char dir[sizeof((struct sockaddr_un *)0)->sun_path];
  struct stat st;
  strcpy(dir, path); /* kw_conn_open has seen that it fits */
  char *slash = strrchr(dir, '/');
  if (slash)
    slash[slash == dir] = 0;
  return stat(slash ? dir : ".", &st) == 0 && st.st_uid == uid && !(st.st_mode & (S_IWGRP | S_IWOTH));
}

/* Who answers decides about the keys, so it must be root, the server's own
   account or the one to which the socket's directory belongs alone. The kernel
   says who called listen(2). */
static enum kw_class check_peer(struct kw_conn *c, const char *path, struct kw_error *e) {
  struct ucred peer;
  socklen_t n = sizeof peer;
  if (getsockopt(c->fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) != 0)
    return drop(c, e, KW_TRANSPORT, strerror(errno));
  if (peer.uid == 0 || peer.uid == geteuid() || owns_directory(peer.uid, path))
    return KW_OK;
  kw_conn_close(c);
  return kw_fail(e, KW_PROTOCOL, "agent socket %s: answered by account %u, which is neither root nor this server's own nor the only one that may write to the socket's directory; it was asked nothing", path, (unsigned)peer.uid);
}

/* Connects. EAGAIN means that the agent's queue is full: not an outage, so it
   is tried again until the deadline. */
enum kw_class kw_conn_open(struct kw_conn *c, const char *path, uint64_t deadline, struct kw_error *e) {
  struct sockaddr_un a = {.sun_family = AF_UNIX};
  kw_conn_close(c);
  if (strlen(path) >= sizeof a.sun_path)
    return kw_fail(e, KW_TRANSPORT, "keyward_socket: the path is longer than %zu bytes", sizeof a.sun_path - 1);
  strcpy(a.sun_path, path);
  c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (c->fd < 0)
    return drop(c, e, KW_TRANSPORT, strerror(errno));
  while (connect(c->fd, (struct sockaddr *)&a, sizeof a) != 0) {
    if (errno == EINTR)
      continue;
    if (errno != EAGAIN)
      return drop(c, e, KW_TRANSPORT, strerror(errno));
    if (kw_now_ms() >= deadline)
      return drop(c, e, KW_TIMEOUT, "connection not accepted in time (keyward_timeout)");
    struct pollfd wake = {c->wake, POLLIN, 0};
    if (poll(&wake, 1, 10) > 0)
      return drop(c, e, KW_CANCELLED, "the server is shutting down");
  }
  KW_COUNT(connects);
  return check_peer(c, path, e);
}

static enum kw_class send_all(struct kw_conn *c, size_t n, uint64_t deadline, struct kw_error *e) {
  for (size_t sent = 0; sent < n;) {
    ssize_t k = send(c->fd, c->buf + sent, n - sent, MSG_NOSIGNAL);
    if (k > 0) {
      sent += (size_t)k;
      continue;
    }
    if (k < 0 && errno == EINTR)
      continue;
    if (k < 0 && errno == EPIPE) /* closed; what it said before is still to be read */
      return KW_OK;
    if (k < 0 && errno != EAGAIN)
      return drop(c, e, KW_TRANSPORT, strerror(errno));
    enum kw_class rc = ready(c, POLLOUT, deadline, e);
    if (rc)
      return rc;
  }
  return KW_OK;
}

static enum kw_class recv_all(struct kw_conn *c, uint8_t *to, size_t n, uint64_t deadline, struct kw_error *e) {
  for (size_t got = 0; got < n;) {
    ssize_t k = recv(c->fd, to + got, n - got, 0);
    if (k > 0) {
      got += (size_t)k;
      continue;
    }
    if (k == 0)
      return drop(c, e, KW_TRANSPORT, "closed by the agent");
    if (errno == EINTR)
      continue;
    if (errno != EAGAIN)
      return drop(c, e, KW_TRANSPORT, strerror(errno));
    enum kw_class rc = ready(c, POLLIN, deadline, e);
    if (rc)
      return rc;
  }
  return KW_OK;
}

/* Sends the n bytes of c->buf and receives the reply's body: into c->buf, or,
   if it holds a key, into c->secret, so that no key byte ever lies in
   unlocked memory. */
static enum kw_class call(struct kw_conn *c, size_t n, uint64_t deadline, size_t *body, struct kw_error *e) {
  uint8_t op = c->buf[4], head[KW_HEADER];
  struct kw_header h;
  if (c->fd < 0)
    return kw_fail(e, KW_TRANSPORT, "agent socket %s: not connected", kw_settings.socket_path);
  if (n == 0)
    return drop(c, e, KW_PROTOCOL, "request too large");
  enum kw_class rc = send_all(c, n, deadline, e);
  if (!rc)
    rc = recv_all(c, head, sizeof head, deadline, e);
  if (rc)
    return rc;
  if (!kw_get_header(head, &h))
    return drop(c, e, KW_PROTOCOL, "bad frame length");
  bool farewell = h.seq == 0 && h.op == KW_OP_ERROR; /* of the connection, not the request */
  if (h.seq != c->seq && !farewell)
    return drop(c, e, KW_PROTOCOL, "answer to another request");
  if (h.op != (op | KW_OP_REPLY) && h.op != KW_OP_ERROR)
    return drop(c, e, KW_PROTOCOL, "unexpected answer");
  bool key = h.op == (KW_OP_GET | KW_OP_REPLY);
  if (key && h.body > KW_SECRET)
    return drop(c, e, KW_PROTOCOL, "malformed key");
  rc = recv_all(c, key ? c->secret : c->buf, h.body, deadline, e);
  if (rc)
    return rc;
  *body = h.body;
  if (h.op != KW_OP_ERROR)
    return KW_OK;
  if (!kw_get_error(c->buf, h.body, e))
    return drop(c, e, KW_PROTOCOL, "malformed error");
  if (farewell)
    kw_conn_close(c);
  return e->class;
}

enum kw_class kw_call_hello(struct kw_conn *c, const struct kw_hello *h, uint64_t deadline, struct kw_hello_reply *out, struct kw_error *e) {
  size_t body;
  enum kw_class rc = call(c, kw_put_hello(c->buf, sizeof c->buf, ++c->seq, h), deadline, &body, e);
  if (rc) /* without a session the connection is of no use */
    kw_conn_close(c);
  else if (!kw_get_hello_reply(c->buf, body, out))
    rc = drop(c, e, KW_PROTOCOL, "malformed hello");
  return rc;
}

enum kw_class kw_call_list(struct kw_conn *c, uint64_t deadline, struct kw_list *out, struct kw_error *e) {
  size_t body;
  enum kw_class rc = call(c, kw_put_list(c->buf, sizeof c->buf, ++c->seq), deadline, &body, e);
  if (!rc && !kw_get_list(c->buf, body, out))
    rc = drop(c, e, KW_PROTOCOL, "malformed list of keys");
  return rc;
}

enum kw_class kw_call_get(struct kw_conn *c, const struct kw_want *w, uint64_t deadline, uint8_t key[KW_KEY_SIZE], struct kw_error *e) {
  size_t body;
  enum kw_class rc = call(c, kw_put_get(c->buf, sizeof c->buf, ++c->seq, w->id, w->version), deadline, &body, e);
  if (!rc && !kw_get_key(c->secret, body, w->id, w->version, key))
    rc = drop(c, e, KW_PROTOCOL, "malformed key");
  explicit_bzero(c->secret, KW_SECRET);
  return rc;
}

enum kw_class kw_call_wait(struct kw_conn *c, uint64_t generation, uint32_t wait_ms, uint64_t deadline, uint64_t *out, struct kw_error *e) {
  size_t body;
  enum kw_class rc = call(c, kw_put_wait(c->buf, sizeof c->buf, ++c->seq, generation, wait_ms), deadline, &body, e);
  if (!rc && !kw_get_generation(c->buf, body, out))
    rc = drop(c, e, KW_PROTOCOL, "malformed generation");
  return rc;
}

enum kw_class kw_call_report(struct kw_conn *c, const struct kw_use *u, size_t n, uint64_t deadline, struct kw_error *e) {
  size_t body;
  enum kw_class rc = call(c, kw_put_report(c->buf, sizeof c->buf, ++c->seq, u, n), deadline, &body, e);
  if (!rc && body != 0)
    rc = drop(c, e, KW_PROTOCOL, "malformed answer to a report");
  return rc;
}
