package catalog

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// The keys. Numbers are in hexadecimal digits of fixed width, so that keys sort
// as numbers do. A star marks keys that end with the lease of a process.
//
//	/atoll/1/state/cluster              Cluster
//	/atoll/1/state/node/<8>             Node, without Up and Report
//	/atoll/1/state/serve/<8>          * served: the process that serves the node
//	/atoll/1/state/report/<8>         * NodeReport
//	/atoll/1/state/copyset/<8>          Copyset
//	/atoll/1/state/process/<32>       * Process
//	/atoll/1/state/elect/<name>       * served: who was elected
//	/atoll/1/state/copies/<n>           null: some medium wants n copies
//	/atoll/1/state/codes/<k>+<m>        null: some medium wants shards of this code
//	/atoll/1/disk/<32>                  NodeID of the disk
//	/atoll/1/members/<8>-<8>-…          CopysetID of these members, ascending
//	/atoll/1/last/node, …/last/copyset  the last number given out
//	/atoll/1/media/record/<16>          Medium
//	/atoll/1/media/name/<name>          MediumID
//	/atoll/1/media/head/<16>            Head
//	/atoll/1/media/deleting/<16>        null: the medium is in state detached
//	                                    or deleting
//	/atoll/1/media/pin/<16>/<16>/m<16>  null: a clone of this medium's version
//	/atoll/1/media/pin/<16>/<16>/p<32>-<16>
//	                                  * null: a process reads the version
//	/atoll/1/media/trash/<16>           Trash: the medium is in state trashed
//	/atoll/1/media/schedule/<16>        Schedule
//	/atoll/1/media/dir/<path>/          Directory
//	/atoll/1/last/entry                 the last number reserved for media and directories
//	/atoll/1/user/<name>                User
//
// Every process loads and watches what lies under state/; the rest is read when
// it is needed. The 1 in the prefix is the version of this layout.
//
// A value is a JSON object:
//
//	{"v":1,"w":"9f3a61c07d52be44","d":{"id":7,"nodes":[1,2,3],"version":1}}
//
// v is the version of the value's format: a newer one than this program knows
// is refused (ErrVersion), never guessed at. w is drawn anew for every write, so
// that a writer whose answer was lost finds out whether the write was its own.
// d is the record; fields unknown to the reader are ignored, and a change that
// an old reader may not ignore raises v: 2 for a medium that is coded, a head that
// lists a coded segment and a copyset of more than five nodes, else 1.
const (
	root           = "/atoll/1/"
	statePrefix    = root + "state/"
	keyCluster     = statePrefix + "cluster"
	nodePrefix     = statePrefix + "node/"
	servePrefix    = statePrefix + "serve/"
	reportPrefix   = statePrefix + "report/"
	copysetPrefix  = statePrefix + "copyset/"
	processPrefix  = statePrefix + "process/"
	electPrefix    = statePrefix + "elect/"
	copiesPrefix   = statePrefix + "copies/"
	codesPrefix    = statePrefix + "codes/"
	diskPrefix     = root + "disk/"
	membersPrefix  = root + "members/"
	keyLastNode    = root + "last/node"
	keyLastSet     = root + "last/copyset"
	recordPrefix   = root + "media/record/"
	namePrefix     = root + "media/name/"
	headPrefix     = root + "media/head/"
	deletePrefix   = root + "media/deleting/"
	pinPrefix      = root + "media/pin/"
	trashPrefix    = root + "media/trash/"
	schedulePrefix = root + "media/schedule/"
	dirPrefix      = root + "media/dir/"
	keyLastEntry   = root + "last/entry"
	userPrefix     = root + "user/"
)

// formatVersion is the newest version of values that this program knows.
const formatVersion = 2

// versionOf returns the version of a record's format: what a program needs to
// know at least.
func versionOf(v any) int {
	coded := false
	switch v := v.(type) {
	case Medium:
		coded = v.Policy.IsCoded()
	case Head:
		coded = slices.ContainsFunc(v.Unsealed, func(u Unsealed) bool { return u.Lane == Shards })
	case Copyset:
		coded = len(v.Nodes) > atoll.MaxCopies
	}
	if coded {
		return 2
	}
	return 1
}

func nodeKey(id atoll.NodeID) string       { return nodePrefix + hex8(uint32(id)) }
func serveKey(id atoll.NodeID) string      { return servePrefix + hex8(uint32(id)) }
func reportKey(id atoll.NodeID) string     { return reportPrefix + hex8(uint32(id)) }
func copysetKey(id atoll.CopysetID) string { return copysetPrefix + hex8(uint32(id)) }
func processKey(id atoll.UUID) string      { return processPrefix + id.String() }
func diskKey(id atoll.UUID) string         { return diskPrefix + id.String() }
func recordKey(id atoll.MediumID) string   { return recordPrefix + id.String() }
func headKey(id atoll.MediumID) string     { return headPrefix + id.String() }
func deleteKey(id atoll.MediumID) string   { return deletePrefix + id.String() }
func nameKey(name string) string           { return namePrefix + name }
func copiesKey(n int) string               { return copiesPrefix + strconv.Itoa(n) }
func codeKey(c Code) string                { return codesPrefix + c.String() }
func trashKey(id atoll.MediumID) string    { return trashPrefix + id.String() }
func scheduleKey(id atoll.MediumID) string { return schedulePrefix + id.String() }
func dirKey(path string) string            { return dirPrefix + path + "/" }
func userKey(name string) string           { return userPrefix + name }
func hex8(v uint32) string                 { return fmt.Sprintf("%08x", v) }

// membersKey names a set of nodes whatever their order.
func membersKey(nodes []atoll.NodeID) string {
	sorted := slices.Clone(nodes)
	slices.Sort(sorted)
	parts := make([]string, len(sorted))
	for i, n := range sorted {
		parts[i] = hex8(uint32(n))
	}
	return membersPrefix + strings.Join(parts, "-")
}

// number parses the number at the end of a key.
func number(key, prefix string) (uint32, error) {
	v, err := strconv.ParseUint(strings.TrimPrefix(key, prefix), 16, 32)
	if err != nil || len(key) != len(prefix)+8 {
		return 0, fmt.Errorf("parse key %q: %w", key, atoll.ErrCorrupt)
	}
	return uint32(v), nil
}

// served is the value of keys that say which process does something.
type served struct {
	Process atoll.UUID `json:"process"`
}

type envelope struct {
	V int             `json:"v"`
	W string          `json:"w"`
	D json.RawMessage `json:"d"`
}

// encode wraps a record. It cannot fail for the types of this package.
func encode(w string, v any) []byte {
	d, err := json.Marshal(v)
	atoll.Assert(err == nil, "encode %T: %v", v, err)
	out, err := json.Marshal(envelope{V: versionOf(v), W: w, D: d})
	atoll.Assert(err == nil, "encode %T: %v", v, err)
	return out
}

// decode is the inverse of encode; ErrVersion, ErrCorrupt.
func decode(kv KeyValue, v any) error {
	e, err := open(kv)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(e.D, v); err != nil {
		return fmt.Errorf("decode key %s: %w: %w", kv.Key, err, atoll.ErrCorrupt)
	}
	return nil
}

func open(kv KeyValue) (envelope, error) {
	var e envelope
	if err := json.Unmarshal(kv.Value, &e); err != nil {
		return e, fmt.Errorf("decode key %s: %w: %w", kv.Key, err, atoll.ErrCorrupt)
	}
	switch {
	case e.V > formatVersion:
		return e, fmt.Errorf("decode key %s of format version %d, this program knows up to %d: %w",
			kv.Key, e.V, formatVersion, atoll.ErrVersion)
	case e.V < 1 || len(e.D) == 0:
		return e, fmt.Errorf("decode key %s: no version or no record: %w", kv.Key, atoll.ErrCorrupt)
	}
	return e, nil
}

// writer returns the mark of a value's writer, "" if there is none.
func writer(kv KeyValue) string {
	if kv.Mod == 0 {
		return ""
	}
	e, err := open(kv)
	if err != nil {
		return ""
	}
	return e.W
}
