package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// stolenRows writes rows that can't be mistaken and looks for them in every
// file, first of an ordinary server, then of the encrypted one.
func (d *demo) stolenRows(ctx context.Context) error {
	plain, err := d.newServer(ctx, "plain")
	if err != nil {
		return err
	}
	if err := plain.start(ctx); err != nil {
		return err
	}
	canary, err := d.writeCanaries(ctx, plain)
	plain.stop()
	if err != nil {
		return err
	}
	hits, files, err := search([][]byte{canary}, plain.dir)
	if err == nil && len(hits) < 3 {
		err = fmt.Errorf("found in %d of %d files only: the test looks in the wrong place", len(hits), files)
	}
	d.check(fmt.Sprintf("without encryption the rows are found (%d of %d files)", len(hits), files), err)
	for _, h := range hits {
		d.say("  %s", d.shorten(h))
	}

	if canary, err = d.writeCanaries(ctx, d.db); err != nil {
		return err
	}
	d.secrets = append(d.secrets, canary)
	if err := d.nowhere(canary, "running"); err != nil {
		return err
	}
	d.db.stop()
	if err := d.nowhere(canary, "stopped"); err != nil {
		return err
	}
	if err := d.db.start(ctx); err != nil {
		return err
	}
	err = d.db.wantCount(ctx, 2000, "SELECT COUNT(*) FROM shop.cards WHERE number LIKE ?", string(canary)+"%")
	d.check("the server itself reads them all", err)
	return err
}

func (d *demo) nowhere(canary []byte, when string) error {
	hits, files, err := search([][]byte{canary}, d.db.dir)
	if err == nil && len(hits) > 0 {
		err = fmt.Errorf("found in %v", hits)
	}
	d.check(fmt.Sprintf("with Keyward they are in none of %d files (server %s)", files, when), err)
	return err
}

// writeCanaries writes rows to InnoDB, Aria, the binlog, a temporary table and
// a sort on disk, and makes them reach the files.
func (d *demo) writeCanaries(ctx context.Context, v *server) ([]byte, error) {
	raw := make([]byte, 8)
	if _, err := rand.Read(raw); err != nil {
		return nil, err
	}
	canary := "CARD-" + hex.EncodeToString(raw)
	d.say("%s: 2000 rows such as %s-17 into InnoDB, Aria, a temporary table, the binlog", v.name, canary)
	for _, q := range []string{
		"CREATE DATABASE shop",
		"CREATE TABLE shop.cards (id INT PRIMARY KEY, number VARCHAR(64), pad CHAR(200)) ENGINE=InnoDB",
		"CREATE TABLE shop.aria (id INT PRIMARY KEY, number VARCHAR(64)) ENGINE=Aria TRANSACTIONAL=1",
		"SET SESSION binlog_format=ROW; INSERT INTO shop.cards SELECT seq, CONCAT('" + canary + "-', seq), 'x' FROM (" + numbers + ") n",
		"INSERT INTO shop.aria SELECT id, number FROM shop.cards",
		"CREATE TEMPORARY TABLE shop.t ENGINE=InnoDB SELECT * FROM shop.cards; UPDATE shop.t SET number=CONCAT(number,'-t'); " +
			"SET SESSION sort_buffer_size=32768; " +
			"SELECT COUNT(*) FROM (SELECT DISTINCT number, pad FROM shop.t ORDER BY pad, number) x",
		"FLUSH TABLES; FLUSH BINARY LOGS; SET GLOBAL innodb_max_dirty_pages_pct=0, innodb_max_dirty_pages_pct_lwm=0",
	} {
		if err := v.exec(ctx, q); err != nil {
			return nil, fmt.Errorf("%s: %w", q[:min(len(q), 60)], err)
		}
	}
	return []byte(canary), await(ctx, v.proc, 20*time.Second, func() error {
		return v.wantCount(ctx, 0, "SELECT variable_value FROM information_schema.global_status WHERE variable_name='innodb_buffer_pool_pages_dirty'")
	})
}

// numbers yields 0 to 1999 without any extra plugin.
const numbers = "SELECT a.n+10*b.n+100*c.n+1000*e.n AS seq FROM " + digits + " a, " + digits + " b, " + digits + " c, " +
	"(SELECT 0 n UNION ALL SELECT 1) e"

const digits = "(SELECT 0 n UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4 UNION ALL " +
	"SELECT 5 UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9)"

// roll rolls the keyring, then the master key.
func (d *demo) roll(ctx context.Context) error {
	var reads, failures atomic.Int64
	rctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for rctx.Err() == nil {
			n, err := d.db.count(rctx, "SELECT COUNT(*) FROM shop.cards WHERE pad='x'")
			if rctx.Err() == nil && (err != nil || n != 2000) {
				failures.Add(1)
			}
			reads.Add(1)
		}
	}()
	err := d.rollKeyring(ctx)
	stop()
	<-done
	if err != nil {
		return err
	}
	if n := failures.Load(); n > 0 {
		err = fmt.Errorf("%d of %d reads failed", n, reads.Load())
	}
	d.check(fmt.Sprintf("old data was readable throughout (%d full reads)", reads.Load()), err)
	return d.rollMaster(ctx)
}

func (d *demo) rollKeyring(ctx context.Context) error {
	before := time.Now()
	if _, err := d.officer(ctx, "keyring", "roll", "shop/system"); err != nil {
		return err
	}
	err := await(ctx, d.db.proc, 10*time.Second, func() error {
		return d.db.wantCount(ctx, 3, "SELECT latest_version FROM information_schema.KEYWARD_KEYS WHERE key_id=1")
	})
	seen := time.Since(before)
	d.check(fmt.Sprintf("version 2 (the server's number 3) reached the idle server %d ms after the roll was ordered",
		seen.Milliseconds()), errors.Join(err, within(seen, time.Second)))
	if err != nil {
		return err
	}
	out, err := d.run(ctx, nil, "keyward", "--identity", d.path("olga"), "keyring", "status", "shop/system",
		"--server-socket", d.db.socket(), "--wait", "--timeout", "60s")
	d.show(out, 12)
	if err == nil {
		err = d.db.wantCount(ctx, 0, "SELECT COUNT(*) FROM information_schema.INNODB_TABLESPACES_ENCRYPTION WHERE MIN_KEY_VERSION < 3 AND NAME IS NOT NULL")
	}
	d.check("the server re-encrypted every page in the background, to the end", err)
	if err != nil {
		return err
	}
	if err := d.db.exec(ctx, "CREATE TABLE shop.orders (id INT PRIMARY KEY AUTO_INCREMENT, note VARCHAR(80)) ENGINE=InnoDB"); err != nil {
		return err
	}
	err = d.db.wantCount(ctx, 3, "SELECT CURRENT_KEY_VERSION FROM information_schema.INNODB_TABLESPACES_ENCRYPTION WHERE NAME='shop/orders'")
	d.check("a new table is written with version 2", err)
	return err
}

func (d *demo) rollMaster(ctx context.Context) error {
	before, err := d.pages()
	if err != nil {
		return err
	}
	if _, err := d.officer(ctx, "key", "roll", "shop/master"); err != nil {
		return err
	}
	out, err := d.officer(ctx, "key", "rewrap", "shop/master")
	d.show(out, 4)
	d.check("the master key is rolled and every wrapped DEK moved to it", err)
	if err != nil {
		return err
	}
	after, err := d.pages()
	if err == nil && !bytes.Equal(before, after) {
		err = fmt.Errorf("the tables' files changed")
	}
	d.check("no page of any table was touched by that", err)
	return err
}

// pages hashes every table file of the shop.
func (d *demo) pages() ([]byte, error) {
	names, err := filepath.Glob(filepath.Join(d.db.data(), "shop", "*.ibd"))
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(b)
		fmt.Fprintf(h, "%s %x\n", n, sum)
	}
	return h.Sum(nil), nil
}
