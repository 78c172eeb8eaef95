// What each policy of the server does, in one sentence.
import { addWords } from "../i18n.js";

addWords({
  "policy.fifo": [
    "Batches in order of arrival; memory for every answer is reserved up to its limit, without predictions.",
    "按到达顺序组成批次；每个回答都按上限预留显存，不用预测。",
  ],
  "policy.s3": [
    "Packs batches by predicted length; an answer that outgrows its bucket is preempted and gets twice the memory next time.",
    "按预测长度装箱成批；超出所在长度档的回答被抢占，下次预留加倍。",
  ],
  "policy.odbs": [
    "Batches answers of like predicted length, so that little is wasted on padding.",
    "把预测长度相近的回答放进同一批，减少填充浪费。",
  ],
  "policy.slo_dbs": [
    "Batches by deadline: a request joins while the batch can still keep everyone's.",
    "按截止时间组批：只要整批仍能按时完成，请求就加入。",
  ],
  "policy.slo_odbs": ["Batches by deadline and predicted length together.", "同时按截止时间和预测长度组批。"],
  "policy.uellm_released": [
    "Sorts by objective plus half the predicted length and cuts batches of 10, as UELLM's released code does.",
    "按时限加一半预测长度排序，每 10 个一批，与 UELLM 公开的代码相同。",
  ],
  "policy.uellm_baseline": [
    "Batches of 10 in order of arrival, the baseline of UELLM's released code.",
    "按到达顺序每 10 个一批，即 UELLM 公开代码中的基线。",
  ],
  "policy.annealing": [
    "Searches, by simulated annealing, the sequence of batches that keeps most deadlines per second.",
    "用模拟退火搜索单位时间内按时完成最多的批次顺序。",
  ],
  "policy.oracle": [
    "Shortest true answers first, in batches: it knows the lengths, so it is for benchmarks only.",
    "按真实长度从短到长成批：需要事先知道长度，只用于基准测试。",
  ],
  "policy.fcfs": [
    "First come, first served; memory grows in blocks with each answer, without predictions.",
    "先来先服务；显存随回答逐块增长，不用预测。",
  ],
  "policy.sjf": [
    "The shortest predicted answer first, and each runs to its end.",
    "预测最短的回答优先，开始后一直运行到结束。",
  ],
  "policy.srpt": [
    "The least predicted work left first; a short request may take the place of a long running one.",
    "预测剩余工作最少的优先；短请求可以替下正在运行的长请求。",
  ],
  "policy.deadline": [
    "As many answers in time as possible: urgent and short ones first, and late ones in a lane of their own, so that none starves.",
    "尽量让更多回答按时完成：紧急的和短的优先；已经超时的另走一条通道，不会饿死。",
  ],
  "policy.deadline_oracle": [
    "The deadline policy with the true lengths in place of predictions, for benchmarks only.",
    "deadline 策略，以真实长度代替预测，只用于基准测试。",
  ],
  "policy.boost": [
    "In order of arrival, but prompts that are short to compute count as if they had come earlier; without predictions.",
    "按到达顺序，但计算量小的提示词视为更早到达；不用预测。",
  ],
  "policy.boost_work": [
    "In order of arrival, but requests with little predicted work count as if they had come earlier.",
    "按到达顺序，但预测工作量小的请求视为更早到达。",
  ],
  "policy.boost_oracle": [
    "The boost policy with the true work in place of the prompt's, for benchmarks only.",
    "boost 策略，以真实工作量代替提示词的，只用于基准测试。",
  ],
  "policy.tie": [
    "The shortest predicted answer first, where an answer that may become very long counts as longer.",
    "预测最短的回答优先，可能变得很长的回答算得更长。",
  ],
  "policy.gittins": [
    "First the request that saves most lateness for a second of the machine, by the whole predicted distribution of its length.",
    "按预测的整个长度分布，机器每秒能减少最多迟到的请求优先。",
  ],
  "policy.gittins_mean": [
    "First the request that saves most waiting for a second of the machine: the least mean latency.",
    "机器每秒能减少最多等待的请求优先：平均延迟最小。",
  ],
  "policy.gittins_tail": [
    "Nearly in order of arrival; much shorter prompts go first, and answers that will be long in any case: the least p99 latency.",
    "接近到达顺序，只有短得多的提示和必然很长的回答才先行：p99 延迟最小。",
  ],
  "policy.gittins_oracle": [
    "The gittins policy with the true lengths in place of predictions, for benchmarks only.",
    "gittins 策略，以真实长度代替预测，只用于基准测试。",
  ],
  "policy.other": ["A policy of this server's own.", "此服务器自定义的策略。"],
});
