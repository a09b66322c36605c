/* Wakes InnoDB's background re-encryption after a roll. An idle server looks
   for newer key versions only when a page is written, when
   information_schema.innodb_tablespaces_encryption is read or when one of its
   variables changes. Reading that table through the server's SQL service is
   the one of these that a plugin can do and that changes nothing.

   It has a thread of its own: a statement may have to wait, and the refresher
   must never wait for the server.
   Copyright (C) 2026 The Keyward Authors.
   SPDX-License-Identifier: GPL-2.0-or-later */
#include "keyward.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <my_global.h>
#include <mysql.h>
#include <mysql/service_sql.h>

/* Of the server; absent in mariadb-backup, where nothing is to be woken. */
extern my_bool my_thread_init(void) __attribute__((weak));
extern void my_thread_end(void) __attribute__((weak));
extern volatile char mysqld_server_started __attribute__((weak));
extern volatile char abort_loop __attribute__((weak));

static struct {
  pthread_mutex_t mu;
  pthread_cond_t changed;
  pthread_t thread;
  bool running, stop;
  int wanted; /* reads still to be made */
} poke = {.mu = PTHREAD_MUTEX_INITIALIZER};

static bool server_is_up(void) {
  return &mysqld_server_started && mysqld_server_started && &abort_loop && !abort_loop;
}

static bool read_encryption_status(void) {
  static const char q[] = "SELECT COUNT(*) FROM information_schema.innodb_tablespaces_encryption";
  MYSQL *m = mysql_init(NULL);
  if (!m)
    return false;
  /* asked once more: from here on a shutdown waits for this session's end */
  bool ok = mysql_real_connect_local(m) != NULL && server_is_up() && mysql_real_query(m, q, sizeof q - 1) == 0;
  MYSQL_RES *res = ok ? mysql_store_result(m) : NULL;
  if (res)
    mysql_free_result(res);
  mysql_close(m);
  return ok;
}

/* Waits on the condition for ms, the lock held. */
static void pause_ms(unsigned ms) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  t.tv_sec += ms / 1000;
  t.tv_nsec += (long)(ms % 1000) * 1000000;
  if (t.tv_nsec >= 1000000000) {
    t.tv_sec++;
    t.tv_nsec -= 1000000000;
  }
  pthread_cond_timedwait(&poke.changed, &poke.mu, &t);
}

static void *run(void *arg) {
  if (my_thread_init)
    my_thread_init();
  pthread_mutex_lock(&poke.mu);
  while (!poke.stop) {
    if (poke.wanted == 0) {
      pthread_cond_wait(&poke.changed, &poke.mu);
      continue;
    }
    if (!server_is_up()) { /* a roll seen while InnoDB recovers */
      pause_ms(100);
      continue;
    }
    poke.wanted--;
    pthread_mutex_unlock(&poke.mu);
    if (read_encryption_status())
      KW_COUNT(pokes);
    pthread_mutex_lock(&poke.mu);
    if (poke.wanted && !poke.stop)
      pause_ms(1000);
  }
  pthread_mutex_unlock(&poke.mu);
  if (my_thread_end)
    my_thread_end();
  return arg;
}

bool kw_poke_start(void) {
  pthread_condattr_t a;
  pthread_condattr_init(&a);
  pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
  pthread_cond_init(&poke.changed, &a);
  pthread_condattr_destroy(&a);
  poke.stop = false;
  poke.wanted = 0;
  poke.running = pthread_create(&poke.thread, NULL, run, NULL) == 0;
  return poke.running;
}

/* Two reads, a second apart: a tablespace that is being opened or created
   during the first is seen by the second. */
void kw_poke(void) {
  pthread_mutex_lock(&poke.mu);
  poke.wanted = 2;
  if (poke.running)
    pthread_cond_signal(&poke.changed);
  pthread_mutex_unlock(&poke.mu);
}

void kw_poke_stop(void) {
  if (!poke.running)
    return;
  pthread_mutex_lock(&poke.mu);
  poke.stop = true;
  pthread_cond_signal(&poke.changed);
  pthread_mutex_unlock(&poke.mu);
  pthread_join(poke.thread, NULL);
  pthread_cond_destroy(&poke.changed);
  poke.running = false;
}
