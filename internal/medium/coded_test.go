package medium_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
)

// codedBook makes a book in small segments that is kept as shards.
func codedBook(t *testing.T, o *mediumtest.Owner, name string, data, parity int) *book {
	t.Helper()
	rec, err := medium.Create(context.Background(), o.Options(), catalog.Medium{
		Name: name, Kind: catalog.KindDB, Owner: "root", Policy: catalog.Policy{Replicas: 3, Segment: 64, Data: data, Parity: parity},
	})
	must(t, err)
	b, err := openBook(o, rec.ID)
	must(t, err)
	return b
}

// encode encodes what the medium thinks is best encoded next.
func (b *book) encode() (int, error) {
	list, _ := b.m.Uncoded()
	var cargo []medium.Cargo
	for _, v := range list {
		_, runs, err := b.pick(v.Ordinal)
		if err != nil {
			return 0, err
		}
		cargo = append(cargo, medium.Cargo{Ordinal: v.Ordinal, Live: runs})
	}
	if len(cargo) == 0 {
		return 0, nil
	}
	return b.m.Encode(context.Background(), cargo)
}

// encodeAll writes a checkpoint and encodes until there is nothing to.
func (b *book) encodeAll(t *testing.T) (n int) {
	t.Helper()
	must(t, b.m.Roll(context.Background(), catalog.Hot))
	must(t, b.m.Roll(context.Background(), catalog.Bulk))
	must(t, b.checkpoint())
	for {
		k, err := b.encode()
		must(t, err)
		if n += k; k == 0 {
			return n
		}
	}
}

// TestEncode: sealed segments become shards, whatever nodes as many as there are
// parity shards are lost everything reads right, and a lost node's shards are
// made anew.
func TestEncode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, 6)
		defer c.Close()
		o := c.Owner("a")
		b := codedBook(t, o, "coded", 4, 2)
		for i := range uint64(900) {
			must(t, b.put(i%700, i+1))
		}
		if n := b.encodeAll(t); n < 8 {
			t.Fatalf("%d segments encoded", n)
		}
		time.Sleep(time.Second)
		must(t, b.check())
		for i, first := range c.IDs() {
			for _, second := range c.IDs()[i+1:] {
				c.Kill(first)
				c.Kill(second)
				if err := readAll(b.m, b.cur); err != nil {
					t.Fatalf("without nodes %v and %v: %v", first, second, err)
				}
				c.Restart(first)
				c.Restart(second)
			}
		}
		must(t, b.m.Close(context.Background()))
		b, err := openBook(c.Owner("b"), b.m.Info().ID)
		must(t, err)
		must(t, b.check())
	})
}

// TestEncodeTooFew: without nodes enough for all shards nothing is encoded, and
// nothing lost.
func TestEncodeTooFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, 4)
		defer c.Close()
		b := codedBook(t, c.Owner("a"), "coded", 4, 2)
		for i := range uint64(300) {
			must(t, b.put(i, i+1))
		}
		must(t, b.m.Roll(context.Background(), catalog.Hot))
		must(t, b.checkpoint())
		if n, err := b.encode(); !errors.Is(err, atoll.ErrUnavailable) {
			t.Fatalf("%d encoded: %v", n, err)
		}
		must(t, b.check())
	})
}
