/* The session with the agent: cold start, the background refresher on one
   connection, misses and forced refreshes on a second one.

   What the server may rely on: nothing here is called by
   get_latest_key_version; every wait has a deadline; whatever the agent does,
   keys and announced versions stay.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#define MAX_WANTS 16384 /* more do not fit a LIST frame */
#define MAX_USES 1000
#define WAIT_MS 5000        /* longest WAIT; also how soon a hung agent shows */
#define INCOMPLETE_MS 1000  /* WAIT while a listed key could not be had yet */
#define BACKOFF_MIN_MS 50
#define BACKOFF_MAX_MS 5000
#define COLD_HELLO_MS 8000
#define PACE_MS 20          /* between two refreshes, at least */
#define MISS_RETRY_MS 25    /* between two attempts at a missing key */
#define FORCED_TIMEOUTS 2   /* a refresh that a client waits for begins nothing later */
#define QUIET_MS 10000      /* between two lines about a lost agent */

/* Of the server; absent where the plugin is loaded by something else. */
extern char my_thread_init(void) __attribute__((weak));
extern void my_thread_end(void) __attribute__((weak));
extern volatile char mysqld_server_started __attribute__((weak));

static struct {
  int wake; /* eventfd, readable once the threads are to stop */
  uint8_t nonce[16];
  _Atomic bool warm; /* this process holds its keys */
  _Atomic uint64_t round;
  pthread_t thread;
  bool running;
  bool loss_told;            /* the refresher's alone */
  pthread_mutex_t list_mu;   /* a LIST and its noting: older news must not come last */
  struct kw_conn background; /* the refresher's, before it the starter's */
  pthread_mutex_t miss_mu;   /* guards miss */
  struct kw_conn miss;
  pthread_mutex_t mu; /* guards what follows */
  bool connected;
  uint64_t refreshed; /* kw_now_ms() of the newest successful refresh */
  uint64_t denied_since;
  uint32_t refresh_ms;
  char instance[256], endpoints[512], last_error[1024];
} s = {.wake = -1,
       .list_mu = PTHREAD_MUTEX_INITIALIZER,
       .miss_mu = PTHREAD_MUTEX_INITIALIZER,
       .mu = PTHREAD_MUTEX_INITIALIZER,
       .background = {.fd = -1},
       .miss = {.fd = -1}};

static uint64_t timeout_ms(void) { return atomic_load(&kw_settings.timeout_ms); }

/* When the answer to a question asked now is late. */
static uint64_t soon(void) { return kw_now_ms() + timeout_ms(); }

/* The same, but not after limit. */
static uint64_t soon_by(uint64_t limit) {
  uint64_t t = soon();
  return t < limit ? t : limit;
}

static bool take(pthread_mutex_t *mu, uint64_t deadline, struct kw_error *e) {
  struct timespec t = {(time_t)(deadline / 1000), (long)(deadline % 1000) * 1000000};
  if (pthread_mutex_clocklock(mu, CLOCK_MONOTONIC, &t) == 0)
    return true;
  kw_fail(e, KW_TIMEOUT, "agent socket %s: busy for longer than keyward_timeout", kw_settings.socket_path);
  return false;
}

/* ---- status -------------------------------------------------------------- */

static void note_hello(const struct kw_hello_reply *h) {
  pthread_mutex_lock(&s.mu);
  memcpy(s.instance, h->instance, sizeof s.instance);
  memcpy(s.endpoints, h->endpoints, sizeof s.endpoints);
  s.refresh_ms = h->refresh_ms;
  pthread_mutex_unlock(&s.mu);
}

static void note_success(void) {
  KW_COUNT(refreshes);
  pthread_mutex_lock(&s.mu);
  s.refreshed = kw_now_ms();
  s.last_error[0] = 0;
  pthread_mutex_unlock(&s.mu);
}

static void note_failure(const struct kw_error *e) {
  KW_COUNT(refresh_failures);
  pthread_mutex_lock(&s.mu);
  snprintf(s.last_error, sizeof s.last_error, "%.1023s", e->text);
  pthread_mutex_unlock(&s.mu);
}

static void note_connected(bool connected) {
  pthread_mutex_lock(&s.mu);
  s.connected = connected;
  pthread_mutex_unlock(&s.mu);
}

void kw_session_status(struct kw_session_status *out) {
  pthread_mutex_lock(&s.mu);
  out->connected = s.connected;
  out->age_ms = s.refreshed ? kw_now_ms() - s.refreshed : 0;
  memcpy(out->endpoints, s.endpoints, sizeof out->endpoints);
  memcpy(out->instance, s.instance, sizeof out->instance);
  memcpy(out->last_error, s.last_error, sizeof out->last_error);
  pthread_mutex_unlock(&s.mu);
}

/* ---- one refresh ----------------------------------------------------------- */

/* Is it a refusal of the agent (the session goes on), not a broken session? */
static bool from_agent(enum kw_class c) { return c >= KW_INVALID && c <= KW_INTERNAL; }

/* A cold HELLO makes the agent ask the KMS, which it gives up after 5 s; its
   answer names keys, endpoint and remedy and is worth waiting for. */
static uint64_t hello_deadline(bool cold, uint64_t deadline) {
  uint64_t ms = atomic_load(&kw_settings.start_timeout_ms);
  uint64_t late = kw_now_ms() + (ms < COLD_HELLO_MS ? ms : COLD_HELLO_MS);
  return cold && late > deadline ? late : deadline;
}

static enum kw_class open_session(struct kw_conn *c, uint64_t deadline, struct kw_error *e) {
  struct kw_hello h = {kw_settings.instance, s.nonce, !atomic_load(&s.warm)};
  struct kw_hello_reply reply;
  if (c->fd >= 0)
    return KW_OK;
  enum kw_class rc = kw_conn_open(c, kw_settings.socket_path, deadline, e);
  if (!rc)
    rc = kw_call_hello(c, &h, hello_deadline(h.cold, deadline), &reply, e);
  if (!rc)
    note_hello(&reply);
  else if (rc == KW_DENIED && !h.cold) /* the instance itself was revoked */
    kw_table_deny_all(e->text);
  return rc;
}

/* list_mu is held. */
static enum kw_class list_locked(struct kw_conn *c, uint64_t deadline, uint64_t *generation, struct kw_error *e) {
  struct kw_list l;
  struct kw_list_entry entry;
  enum kw_class rc = kw_call_list(c, deadline, &l, e);
  if (rc)
    return rc;
  uint64_t round = atomic_fetch_add(&s.round, 1) + 1;
  *generation = l.generation;
  if (l.left == 0 && !atomic_load(&s.warm))
    return kw_fail(e, KW_NOT_FOUND, "the agent has no keyring for this instance; the security officer runs: keyward plugin prepare mariadb, then the DBA: keyward plugin register mariadb");
  kw_table_generation(l.generation);
  while (kw_list_next(&l, &entry))
    if (!kw_table_note(&entry, round))
      kw_log(KW_ERROR, "key id %u: no memory, or too many key ids", entry.id);
  kw_table_unlisted(round);
  return KW_OK;
}

static enum kw_class list(struct kw_conn *c, uint64_t limit, uint64_t *generation, struct kw_error *e) {
  if (!take(&s.list_mu, soon_by(limit), e))
    return e->class;
  enum kw_class rc = list_locked(c, soon_by(limit), generation, e);
  pthread_mutex_unlock(&s.list_mu);
  return rc;
}

/* Gets one key into locked memory and into the table. */
static enum kw_class get(struct kw_conn *c, const struct kw_want *w, uint64_t deadline, bool *rolled, struct kw_error *e) {
  uint8_t *key = c->secret + KW_SECRET;
  enum kw_class rc = kw_call_get(c, w, deadline, key, e);
  if (!rc && !kw_table_put(w->id, w->version, key, rolled))
    rc = kw_fail(e, KW_INTERNAL, "key id %u version %u could not be stored", w->id, w->version);
  else if (rc)
    kw_table_error(w->id, w->version, e);
  explicit_bzero(key, KW_KEY_SIZE);
  return rc;
}

/* May a server start without this version? InnoDB calls a table corrupted until
   the next start once a page was read without its key, and may abort when that
   meets its re-encryption (fil0crypt.cc, "end_lsn > state->end_lsn"): so not,
   unless the DBA says that what the KMS refuses is no longer needed. */
static bool start_without(const struct kw_want *w, enum kw_class rc, const struct kw_error *e) {
  if (w->current || kw_settings.require_old_keys || (rc != KW_DENIED && rc != KW_NOT_FOUND))
    return false;
  kw_log(KW_WARN, "starting without key id %u version %u: %s", w->id, w->version, e->text);
  return true;
}

/* Gets what is listed and not held, newest versions first. A version that the
   agent refuses does not stop the others, except at a cold start. */
static enum kw_class get_wanted(struct kw_conn *c, uint64_t limit, bool *rolled, struct kw_error *e) {
  bool cold = !atomic_load(&s.warm);
  struct kw_want *w = calloc(MAX_WANTS, sizeof *w);
  if (!w)
    return kw_fail(e, KW_INTERNAL, "out of memory");
  size_t n = kw_table_wanted(w, MAX_WANTS, cold);
  enum kw_class rc = KW_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    if (kw_now_ms() >= limit) {
      rc = kw_fail(e, KW_TIMEOUT, "agent socket %s: %zu keys are still to come, the server asks for them in the background", kw_settings.socket_path, n - i);
      break;
    }
    rc = get(c, &w[i], soon(), rolled, e);
    if (from_agent(rc) && (!cold || start_without(&w[i], rc, e)))
      rc = KW_OK;
  }
  free(w);
  return rc;
}

static enum kw_class report(struct kw_conn *c, struct kw_error *e) {
  static struct kw_use u[MAX_USES]; /* the refresher's alone */
  size_t n = kw_table_uses(u, MAX_USES);
  if (n == 0)
    return KW_OK;
  enum kw_class rc = kw_call_report(c, u, n, soon(), e);
  return from_agent(rc) ? KW_OK : rc;
}

/* Opens the session if needed, lists, gets; begins nothing after limit. Never
   lets go of anything. */
static enum kw_class refresh(struct kw_conn *c, uint64_t limit, uint64_t *generation, struct kw_error *e) {
  bool rolled = false;
  enum kw_class rc = open_session(c, soon_by(limit), e);
  if (!rc)
    rc = list(c, limit, generation, e);
  if (!rc)
    rc = get_wanted(c, limit, &rolled, e);
  if (rolled)
    kw_poke();
  if (rc)
    note_failure(e);
  else
    note_success();
  return rc;
}

/* ---- cold start ------------------------------------------------------------ */

static bool stopping(unsigned wait_ms) {
  struct pollfd p = {s.wake, POLLIN, 0};
  return poll(&p, 1, (int)wait_ms) > 0;
}

static unsigned next_backoff(unsigned ms) {
  ms *= 2;
  return ms > BACKOFF_MAX_MS ? BACKOFF_MAX_MS : ms;
}

/* Between half and all of it, so that many servers do not come at once. */
static unsigned jitter(unsigned ms) {
  uint32_t r = 0;
  if (getrandom(&r, sizeof r, GRND_NONBLOCK) < 0)
    r = (uint32_t)kw_now_ms();
  return ms / 2 + r % (ms / 2 + 1);
}

static bool conns_init(void) {
  s.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  uint8_t *a = kw_arena_take(KW_SECRET + KW_KEY_SIZE);
  uint8_t *b = kw_arena_take(KW_SECRET + KW_KEY_SIZE);
  if (s.wake < 0 || !a || !b || getrandom(s.nonce, sizeof s.nonce, 0) != sizeof s.nonce)
    return false;
  kw_conn_init(&s.background, s.wake, a);
  kw_conn_init(&s.miss, s.wake, b);
  return true;
}

enum kw_class kw_session_start(struct kw_error *e) {
  uint64_t generation, deadline = kw_now_ms() + atomic_load(&kw_settings.start_timeout_ms);
  if (!conns_init())
    return kw_fail(e, KW_INTERNAL, "no memory, event descriptor or random numbers: %s", strerror(errno));
  bool told = false;
  for (unsigned backoff = BACKOFF_MIN_MS;; backoff = next_backoff(backoff)) {
    enum kw_class rc = refresh(&s.background, UINT64_MAX, &generation, e);
    if (!rc) {
      atomic_store(&s.warm, true);
      note_connected(true);
      return KW_OK;
    }
    bool again = rc == KW_UNAVAILABLE || rc >= KW_TRANSPORT;
    if (!again || kw_now_ms() + backoff >= deadline)
      return rc;
    if (!told)
      kw_log(KW_WARN, "%s; trying again for %u s (keyward_start_timeout)", e->text, atomic_load(&kw_settings.start_timeout_ms) / 1000);
    told = true;
    if (stopping(jitter(backoff)))
      return kw_fail(e, KW_CANCELLED, "the server is shutting down");
  }
}

/* ---- background refresher ---------------------------------------------------- */

/* Shuts the server down cleanly once access has been denied for the grace
   time, if the DBA chose so. An agent that is merely away counts neither way. */
static void act_on_revoke(void) {
  uint32_t ids, keys, denied;
  kw_table_totals(&ids, &keys, &denied);
  pthread_mutex_lock(&s.mu);
  if (denied == 0)
    s.denied_since = 0;
  else if (s.denied_since == 0)
    s.denied_since = kw_now_ms();
  uint64_t since = s.denied_since;
  pthread_mutex_unlock(&s.mu);
  static bool done; /* this thread's alone */
  bool due = since && kw_now_ms() - since >= atomic_load(&kw_settings.revoke_grace_ms);
  bool server = &mysqld_server_started && mysqld_server_started;
  if (!due || done || !server || atomic_load(&kw_settings.on_revoke) != KW_SHUTDOWN)
    return;
  done = true;
  kw_log(KW_ERROR, "access to %u of %u key ids is denied and keyward_on_revoke=shutdown: shutting the server down", denied, ids);
  kill(getpid(), SIGTERM);
}

/* How long the next WAIT may take. */
static uint32_t wait_ms(void) {
  struct kw_want w;
  uint32_t ms = WAIT_MS;
  pthread_mutex_lock(&s.mu);
  if (s.refresh_ms && s.refresh_ms < ms)
    ms = s.refresh_ms;
  bool denied = s.denied_since != 0;
  pthread_mutex_unlock(&s.mu);
  bool soon = denied && atomic_load(&kw_settings.on_revoke) == KW_SHUTDOWN;
  if (ms > INCOMPLETE_MS && (soon || kw_table_wanted(&w, 1, false) > 0))
    ms = INCOMPLETE_MS;
  return ms;
}

/* One life of the background connection: returns why it ended. */
static enum kw_class stay_connected(struct kw_error *e) {
  bool first = true;
  for (;;) {
    uint64_t generation = 0;
    enum kw_class rc = refresh(&s.background, UINT64_MAX, &generation, e);
    if (!rc)
      rc = report(&s.background, e);
    if (rc)
      return rc;
    if (first) {
      note_connected(true);
      if (s.loss_told)
        kw_log(KW_NOTE, "the agent answers again");
      s.loss_told = first = false;
    }
    act_on_revoke();
    uint32_t ms = wait_ms();
    uint64_t began = kw_now_ms();
    rc = kw_call_wait(&s.background, generation, ms, began + ms + timeout_ms(), &generation, e);
    if (rc)
      return rc;
    /* an agent whose generation never rests must not keep a core busy */
    if (kw_now_ms() - began < PACE_MS && stopping(PACE_MS))
      return kw_fail(e, KW_CANCELLED, "the server is shutting down");
  }
}

static void *refresher(void *arg) {
  unsigned backoff = BACKOFF_MIN_MS;
  bool lost = false;
  uint64_t quiet_until = 0; /* an agent that comes and goes must not fill a disk */
  struct kw_error e;
  if (my_thread_init)
    my_thread_init();
  do {
    uint64_t before = atomic_load(&kw_counters.refreshes);
    enum kw_class rc = stay_connected(&e);
    kw_conn_close(&s.background);
    note_connected(false);
    if (rc == KW_CANCELLED)
      break;
    bool worked = atomic_load(&kw_counters.refreshes) != before;
    if ((worked || !lost) && kw_now_ms() >= quiet_until) {
      kw_log(KW_WARN, "%s; the server goes on with the keys it holds; reconnecting", e.text);
      quiet_until = kw_now_ms() + QUIET_MS;
      s.loss_told = true;
    }
    note_failure(&e);
    lost = true;
    backoff = worked ? BACKOFF_MIN_MS : next_backoff(backoff);
    act_on_revoke();
  } while (!stopping(jitter(backoff)));
  if (my_thread_end)
    my_thread_end();
  return arg;
}

/* The server's signals are for its own signal thread: ours block them all. */
bool kw_threads_start(void) {
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  /* the refresher uses the other one: that starts before it and ends after it */
  s.running = kw_poke_start() && pthread_create(&s.thread, NULL, refresher, NULL) == 0;
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  return s.running;
}

void kw_threads_stop(void) {
  uint64_t one = 1;
  if (s.running && write(s.wake, &one, sizeof one) == sizeof one)
    pthread_join(s.thread, NULL);
  s.running = false;
  kw_poke_stop();
}

void kw_session_close(void) {
  pthread_mutex_lock(&s.miss_mu);
  kw_conn_close(&s.miss);
  pthread_mutex_unlock(&s.miss_mu);
  kw_conn_close(&s.background);
  if (s.wake >= 0)
    close(s.wake);
  s.wake = -1;
  atomic_store(&s.warm, false);
}

/* ---- misses -------------------------------------------------------------------- */

/* Tries until the deadline while the agent or the KMS cannot be reached: the
   agent may be restarting, and InnoDB never asks again for a key it was
   refused. Asking twice is safe, GET changes nothing. */
enum kw_class kw_session_fetch(uint32_t id, uint32_t version, struct kw_error *e) {
  struct kw_want w = {id, version, false};
  bool rolled = false;
  uint64_t deadline = soon();
  if (!take(&s.miss_mu, deadline, e))
    return e->class;
  enum kw_class rc = KW_OK;
  while (!kw_table_key(id, version, NULL)) { /* another thread may have got it */
    rc = open_session(&s.miss, deadline, e);
    if (!rc)
      rc = get(&s.miss, &w, deadline, &rolled, e);
    bool again = rc == KW_TRANSPORT || rc == KW_UNAVAILABLE;
    if (!again || kw_now_ms() + MISS_RETRY_MS >= deadline || stopping(MISS_RETRY_MS))
      break;
  }
  pthread_mutex_unlock(&s.miss_mu);
  if (rolled)
    kw_poke();
  return rc;
}

/* An idle connection may have been closed by a restarted agent: one more try
   on a fresh one. */
enum kw_class kw_session_refresh(struct kw_error *e) {
  uint64_t generation, limit = kw_now_ms() + FORCED_TIMEOUTS * timeout_ms();
  if (!take(&s.miss_mu, soon(), e))
    return e->class;
  bool kept = s.miss.fd >= 0;
  enum kw_class rc = refresh(&s.miss, limit, &generation, e);
  if (rc == KW_TRANSPORT && kept)
    rc = refresh(&s.miss, limit, &generation, e);
  pthread_mutex_unlock(&s.miss_mu);
  return rc;
}
